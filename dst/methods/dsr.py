"""Dynamic sparse reparameterization."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import compose, documented
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import Uniform
from dst.pieces.amounts import BelowThreshold
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Amount, Init, Pattern, Redistribution, Score
from dst.pieces.redistribute import Survivors
from dst.pieces.schedules import Constant


@documented
def dsr(
    density: float = 0.1,
    *,
    update_every: Duration = 100,
    start: Duration = 0,
    stop: Duration = 1.0,
    amount: Amount = BelowThreshold(),
    allocation: Allocation = Uniform(),
    init: Init = inits.Random(),
    drop: Score = scores.Magnitude(),
    grow: Score = scores.Random(),
    redistribute: Redistribution = Survivors(),
    replace_step: bool = False,
    rescale_init: bool = False,
    grown_warmup: int = 0,
    pattern: Pattern = Unstructured(),
    backend: str = "masked",
) -> Method:
    """Dynamic sparse reparameterization (Mostafa & Wang 2019, https://arxiv.org/abs/1902.05967, Algorithm 1).

    Drops the weights below one threshold for the whole network. As many are grown at random positions, at zero; each
    layer gets a share in proportion to its remaining weights. The threshold doubles or halves so that an update drops
    about its target.

    Deviations: the target is a share of the active connections, where the authors give a number for each network.
    Connections dropped in an update are not candidates for its growth. No layer loses more than nine tenths of its
    connections at once. The authors update ever more rarely; here the interval is constant.

    Args:
        amount: How many connections an update drops.
        allocation: How the initial budget is split over layers.
    """
    return compose("dsr", **locals(), fraction=Constant(0.0), regrow_dropped=False)
