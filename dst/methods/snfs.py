"""Sparse momentum."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import compose, documented
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import Uniform
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Fraction, Init, Pattern, Redistribution, Score
from dst.pieces.redistribute import MeanMomentum
from dst.pieces.schedules import Cosine


@documented
def snfs(
    density: float = 0.1,
    *,
    update_every: Duration = 100,
    start: Duration = 0,
    stop: Duration = 1.0,
    fraction: Fraction = Cosine(0.5),
    allocation: Allocation = Uniform(),
    init: Init = inits.Random(),
    drop: Score = scores.Magnitude(),
    grow: Score = scores.Momentum(),
    redistribute: Redistribution = MeanMomentum(),
    replace_step: bool = False,
    regrow_dropped: bool = True,
    rescale_init: bool = False,
    grown_warmup: int = 0,
    pattern: Pattern = Unstructured(),
    backend: str = "masked",
) -> Method:
    """Sparse networks from scratch, by sparse momentum (Dettmers & Zettlemoyer 2019, https://arxiv.org/abs/1907.04840).

    Every layer drops a share of its smallest weights. The dropped budget goes to the layers with the largest mean
    momentum of active weights, and within a layer to the inactive weights with the largest momentum. Momentum is a mean
    of the dense gradients, which are computed at every step.

    Deviations: the average of gradients is not the optimizer's, which sees masked gradients (``scores.Momentum``). The authors update once per epoch (pass ``update_every=`` the steps of one), lower the share that nearly
    dense layers drop, fill no layer beyond 99%, and round shares up; here rounding is exact. A layer never loses its
    last connection.

    Args:
        fraction: Share of a layer's active connections that an update drops.
        allocation: How the initial budget is split over layers.
    """
    return compose("snfs", **locals())
