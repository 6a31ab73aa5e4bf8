"""Sparse evolutionary training."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import compose, documented
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import ERK
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Fraction, Init, Pattern, Score
from dst.pieces.schedules import Constant


@documented
def set_(
    density: float = 0.1,
    *,
    update_every: Duration = 100,
    start: Duration = 0,
    stop: Duration = 1.0,
    fraction: Fraction = Constant(0.3),
    allocation: Allocation = ERK(),
    init: Init = inits.Random(),
    drop: Score = scores.SignedMagnitude(),
    grow: Score = scores.Random(),
    replace_step: bool = False,
    regrow_dropped: bool = True,
    rescale_init: bool = False,
    pattern: Pattern = Unstructured(),
    grown_warmup: int = 0,
    backend: str = "masked",
) -> Method:
    """Sparse evolutionary training (Mocanu et al. 2018, https://arxiv.org/abs/1707.04780).

    Drops the weights nearest zero of each sign, grows as many at random. As published, the fraction ζ = 0.3 is constant
    and updates continue to the end.

    Deviations: the authors update once per epoch (pass ``update_every=`` the steps of one), after its last step, and
    give grown connections small random weights; here they start at zero, as in RigL's code for SET. The authors
    allocate by ER; ERK is the same for fully connected layers.
    """
    return compose("set", **locals())
