"""RigL with in-time over-parameterization."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import compose, documented
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import ERK
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Fraction, Init, Pattern, Score
from dst.pieces.schedules import Cosine


@documented
def rigl_itop(
    density: float = 0.1,
    *,
    update_every: Duration = 0.04,
    start: Duration = 0.04,
    stop: Duration = 1.0,
    fraction: Fraction = Cosine(0.5),
    allocation: Allocation = ERK(),
    init: Init = inits.Random(),
    drop: Score = scores.Magnitude(),
    grow: Score = scores.Gradient(),
    replace_step: bool = False,
    regrow_dropped: bool = True,
    rescale_init: bool = False,
    grown_warmup: int = 0,
    pattern: Pattern = Unstructured(),
    backend: str = "masked",
) -> Method:
    """RigL-ITOP: RigL with in-time over-parameterization (Liu et al. 2021, https://arxiv.org/abs/2102.02887).

    Updates are rarer and larger than RigL's and continue to the end: new connections have time to grow before they are
    scored, and the network tries most of its weights over training. ΔT is 4000 of 97,750 steps in the authors' settings
    for CIFAR; here it is the same share of training, so that short trainings explore too.

    Deviations: the authors' fraction ends at 0.005 instead of 0. They update after the step, here before it.
    """
    return compose("rigl_itop", **locals())
