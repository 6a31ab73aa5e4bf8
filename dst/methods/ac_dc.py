"""Alternating compressed and dense training."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import documented
from dst.pieces import scores
from dst.pieces.allocation import Global
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Pattern, Score
from dst.pieces.schedules import Alternating, Constant, Every


@documented
def ac_dc(
    density: float = 0.1,
    *,
    phase: Duration = 0.05,
    start: Duration = 0.1,
    stop: Duration = 0.8,
    allocation: Allocation = Global(),
    drop: Score = scores.Magnitude(),
    grown_warmup: int = 0,
    pattern: Pattern = Unstructured(),
    backend: str = "masked",
) -> Method:
    """AC/DC, alternating compressed/decompressed training (Peste et al. 2021, https://arxiv.org/abs/2106.12379).

    After a dense warm-up, sparse phases on the largest weights alternate with dense phases, in which pruned weights
    start from zero. The last phase is sparse. One training yields a dense and a sparse network. The defaults are the
    shares of the authors' 100 epochs on ImageNet: 10 dense epochs, phases of 5, and a sparse last phase.

    Deviation: the authors' last dense phase is twice as long (75% to 85% of training); here all phases have the same
    length.

    Args:
        density: Density of sparse phases, in (0, 1].
        phase: Length of a phase.
        start: End of the dense warm-up.
        stop: Latest start of the last sparse phase.
    """
    return Method(
        name="ac_dc",
        density=density,
        allocation=allocation,
        drop=drop,
        grow=scores.Random(),  # all that are inactive come back at once: in what order does not matter
        clock=Every(phase, start, stop),
        fraction=Constant(0.0),
        schedule=Alternating(phase, start, stop),
        replace_step=False,
        grown_warmup=grown_warmup,
        pattern=pattern,
        backend=backend,
    )
