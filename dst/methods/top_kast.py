"""Top-KAST: always sparse, by the largest of weights that live on."""

from __future__ import annotations

from dst.method import Method
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import Uniform
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Init, Pattern
from dst.pieces.relaxations import StraightThrough
from dst.pieces.schedules import Constant, Every


def top_kast(
    density: float = 0.1,
    *,
    backward_density: float | None = None,
    update_every: Duration = 1,
    start: Duration = 0,
    stop: Duration = 1.0,
    decay: float = 1e-4,
    allocation: Allocation | None = None,
    init: Init | None = None,
    pattern: Pattern | None = None,
) -> Method:
    """Top-KAST (Jayakumar et al. 2021, https://arxiv.org/abs/2106.03517).

    The forward pass uses A, the D · N weights of largest magnitude of every layer; gradients move B, the (D + M) · N
    largest. An exploration regularisation shrinks A by ``decay`` and the rest of B by ``decay`` / D, so that weights are
    not kept in A by having been there first.

    Deviations: the regularisation is added to gradients as the optimizer's step begins, behind clipping. D is the
    network's density in every layer, which is the layer's where the budget is split uniformly, as published.

    Args:
        density: D, density of the forward pass, in (0, 1].
        backward_density: D + M; twice ``density`` by default, and at most 1.
        update_every: Steps between selections of A and B; the authors' results hold up to 100.
        start: First step that may select.
        stop: First step that may not.
        decay: Coefficient of the exploration regularisation's gradient, >= 0.
        allocation: How the budget is split; uniform by default.
        init: First mask; the largest weights by default.
        pattern: Which weights live and die together; every weight for itself by default.
    """
    return Method(
        name="top_kast",
        density=density,
        allocation=allocation if allocation is not None else Uniform(),
        init=init if init is not None else inits.Magnitude(),
        drop=scores.Magnitude(),
        grow=scores.Magnitude(),
        clock=Every(update_every, start, stop),
        fraction=Constant(1.0),
        replace_step=False,
        relaxation=StraightThrough(
            backward_density=min(1.0, 2 * density) if backward_density is None else backward_density,
            active_decay=decay,
            inactive_decay=decay / density if density > 0 else decay,
        ),
        pattern=pattern if pattern is not None else Unstructured(),
    )
