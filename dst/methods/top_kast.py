"""Top-KAST: always sparse, by the largest of latent weights."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import documented
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import Uniform
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Init, Pattern
from dst.pieces.relaxations import StraightThrough
from dst.pieces.schedules import Constant, Every


@documented
def top_kast(
    density: float = 0.1,
    *,
    backward_density: float | None = None,
    update_every: Duration = 1,
    start: Duration = 0,
    stop: Duration = 1.0,
    decay: float = 1e-4,
    allocation: Allocation = Uniform(),
    init: Init = inits.Magnitude(),
    pattern: Pattern = Unstructured(),
) -> Method:
    """Top-KAST (Jayakumar et al. 2021, https://arxiv.org/abs/2106.03517).

    The forward pass uses A, the D · N weights of largest magnitude of every layer; gradients update B, the (D + M) · N
    largest. An exploration regularisation shrinks A by ``decay`` and the rest of B by ``decay`` / D, so that weights do
    not stay in A only because they entered it first.

    Deviations: the regularisation is added to gradients at the start of the optimizer's step, after clipping. D is the
    network's density in every layer, which is the layer's own if the allocation is uniform, as published.

    Args:
        density: D, density of the forward pass, in (0, 1].
        backward_density: D + M; ``None`` for twice ``density``, at most 1.
        update_every: Steps between selections of A and B; the authors' results hold up to 100.
        start: First step that may select.
        stop: First step that may no longer select.
        decay: Coefficient of the exploration regularisation's gradient, >= 0.
    """
    return Method(
        name="top_kast",
        density=density,
        allocation=allocation,
        init=init,
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
        pattern=pattern,
    )
