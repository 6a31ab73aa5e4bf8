"""Which methods can be trained on non-zeros alone.

A method refuses ``backend="csr"`` when it is built, so this is known here, below the backends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dst.pieces import scores
from dst.pieces.protocols import ActiveScore, as_sampler, waits_for_batch

if TYPE_CHECKING:
    from dst.method.composition import Method


def needs_inactive_weights(method: Method) -> str | None:
    """Return why the method needs inactive weights, or ``None`` if non-zeros are enough."""
    if method.lottery is not None:
        return "its first level is dense"
    if method.init.needs_gradient:
        return f"the first mask, by {type(method.init).__name__}, needs the gradient of every weight"
    if waits_for_batch(method.init):
        return f"the first mask, by {type(method.init).__name__}, is decided on all weights in the first step"
    if method.sparsify_at != 0:
        return f"training is dense until sparsify_at={method.sparsify_at} (0 makes the mask at once)"
    if method.schedule is not None or method.redistribute is not None or method.surplus is not None:
        return "it changes the number of a layer's connections"
    if method.amount is not None or method.chain_removal or method.perturb is not None or method.grown_warmup:
        return "it uses amount, chain_removal, perturb or grown_warmup, which need masks"
    if method.pattern.is_grouped:
        return f"{type(method.pattern).__name__} needs masks to choose groups"
    for score in method.scores().values():
        if score.observes:
            return f"{type(score).__name__} watches every weight at every step"
    if method.drop is not None and not (isinstance(method.drop, ActiveScore) and method.drop.active_only):
        return f"{type(method.drop).__name__} is no drop score of the active weights alone"
    if method.grow is not None and as_sampler(method.grow) is None and type(method.grow) is not scores.Gradient:
        return f"csr grows by gradient or at random, not by {type(method.grow).__name__}"
    return None
