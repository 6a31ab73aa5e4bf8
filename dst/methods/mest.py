"""Memory-economic sparse training."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import compose, documented
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import Uniform
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Fraction, Init, Pattern, Score
from dst.pieces.schedules import Cosine


@documented
def mest(
    density: float = 0.1,
    *,
    update_every: Duration = 100,
    start: Duration = 0,
    stop: Duration = 0.75,
    fraction: Fraction = Cosine(0.2),
    surplus: Fraction | None = None,
    allocation: Allocation = Uniform(),
    init: Init = inits.Random(),
    drop: Score = scores.MagnitudeAndGradient(),
    grow: Score = scores.Random(),
    replace_step: bool = False,
    regrow_dropped: bool = False,
    rescale_init: bool = False,
    grown_warmup: int = 0,
    pattern: Pattern = Unstructured(),
    backend: str = "masked",
) -> Method:
    """MEST, memory-economic sparse training (Yuan et al. 2021, https://arxiv.org/abs/2110.14032).

    Elastic mutation (EM): an update drops the connections with the lowest abs(w) + λ · abs(gradient) and grows as many
    at random; the replaced share falls over training. With a soft memory bound (EM&S, ``surplus``) grown connections
    exceed the budget until the next update, which drops the lowest of all.

    Deviations: the share follows a cosine, where the authors' falls in two or three steps (from 0.2, at 90% sparsity).
    λ is 0 by default in the authors' code, and 1 here. The gradient is that of the update's step.

    Args:
        stop: First step that may no longer update; a surplus ends there.
        fraction: Share of a layer's active connections that an update replaces; ignored with a ``surplus``.
        surplus: Connections beyond the budget, as a share of it, such as ``Cosine(0.2)``; ``None`` for none.
    """
    return compose("mest", **locals())
