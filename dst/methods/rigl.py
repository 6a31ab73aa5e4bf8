"""RigL, the rigged lottery."""

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
def rigl(
    density: float = 0.1,
    *,
    update_every: Duration = 100,
    start: Duration = 0,
    stop: Duration = 0.75,
    fraction: Fraction = Cosine(0.3),
    allocation: Allocation = ERK(),
    init: Init = inits.Random(),
    drop: Score = scores.Magnitude(),
    grow: Score = scores.Gradient(),
    replace_step: bool = True,
    regrow_dropped: bool = True,
    rescale_init: bool = False,
    pattern: Pattern = Unstructured(),
    grown_warmup: int = 0,
    backend: str = "masked",
) -> Method:
    """RigL, the rigged lottery (Evci et al. 2020, https://arxiv.org/abs/1911.11134, Algorithm 1).

    Every ΔT steps the weights of smallest magnitude are dropped and those with the largest dense gradient are grown, at
    zero. The defaults are those of the authors' code: ERK, ΔT = 100, cosine from α = 0.3, updates until 75% of
    training, each of which replaces the optimizer's step, and a just-dropped connection may regrow with its value.

    Deviation: ties are broken by seeded random choice, where the authors add noise of standard deviation 1e-5 to the
    drop scores.
    """
    return compose("rigl", **locals())
