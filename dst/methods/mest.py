"""Memory-economic sparse training."""

from __future__ import annotations

from dst.method import Method
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import Uniform
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Fraction, Init, Pattern, Score
from dst.pieces.schedules import Cosine, Every


def mest(
    density: float = 0.1,
    *,
    update_every: Duration = 100,
    start: Duration = 0,
    stop: Duration = 0.75,
    fraction: Fraction | None = None,
    surplus: Fraction | None = None,
    allocation: Allocation | None = None,
    init: Init | None = None,
    drop: Score | None = None,
    grow: Score | None = None,
    replace_step: bool = False,
    regrow_dropped: bool = False,
    rescale_init: bool = False,
    grown_warmup: int = 0,
    pattern: Pattern | None = None,
    backend: str = "masked",
) -> Method:
    """MEST, memory-economic sparse training (Yuan et al. 2021, https://arxiv.org/abs/2110.14032).

    Elastic mutation (EM): connections with the lowest abs(w) + λ · abs(gradient) go, as many come at random, and their share
    shrinks. With a soft memory bound (EM&S, ``surplus``): the new ones come on top of the budget, are trained beside the old
    until the next update, and then the lowest of both go.

    Deviations: the share follows a cosine, where the authors' takes two or three steps down (0.2 first, at 90% sparsity).
    λ is 0 by default in the authors' code, and 1 here. The gradient is that of the update's step.

    Args:
        density: Target density, in (0, 1].
        update_every: Steps between updates.
        start: First step that may update.
        stop: First step that may not; a surplus goes there.
        fraction: Share of the connections replaced; ``Cosine(0.2)`` by default. Without effect where there is a surplus.
        surplus: Share of the budget on top of it, such as ``Cosine(0.2)``; by default none.
        allocation: How the budget is split; uniform by default.
        init: First mask; random by default.
        drop: Drop score; ``MagnitudeAndGradient()`` by default.
        grow: Grow score; random by default.
        replace_step: Whether an update takes the place of a step.
        regrow_dropped: Whether just-dropped connections are candidates for growth.
        rescale_init: Scale initial weights to the active fan-in.
        grown_warmup: Steps over which grown weights come to move in full.
        pattern: Which weights live and die together; every weight for itself by default.
        backend: Where weights live.
    """
    return Method(
        name="mest",
        density=density,
        allocation=allocation if allocation is not None else Uniform(),
        init=init if init is not None else inits.Random(),
        drop=drop if drop is not None else scores.MagnitudeAndGradient(),
        grow=grow if grow is not None else scores.Random(),
        clock=Every(update_every, start, stop),
        fraction=fraction if fraction is not None else Cosine(0.2),
        surplus=surplus,
        replace_step=replace_step,
        regrow_dropped=regrow_dropped,
        rescale_init=rescale_init,
        grown_warmup=grown_warmup,
        pattern=pattern if pattern is not None else Unstructured(),
        backend=backend,
    )
