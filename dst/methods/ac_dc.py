"""Alternating compressed and dense training."""

from __future__ import annotations

from dst.method import Method
from dst.pieces import scores
from dst.pieces.allocation import Global
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Pattern, Score
from dst.pieces.schedules import Alternating, Constant, Every


def ac_dc(
    density: float = 0.1,
    *,
    phase: Duration = 0.05,
    start: Duration = 0.1,
    stop: Duration = 0.8,
    allocation: Allocation | None = None,
    drop: Score | None = None,
    grown_warmup: int = 0,
    pattern: Pattern | None = None,
    backend: str = "masked",
) -> Method:
    """AC/DC, alternating compressed/decompressed training (Peste et al. 2021, https://arxiv.org/abs/2106.12379).

    After a dense warm-up, sparse phases on the largest weights alternate with dense ones, in which pruned weights set out
    from zero. The last phase is sparse. The same training gives a dense and a sparse network. The defaults are the shares of the
    authors' 100 epochs on ImageNet: dense for 10, then phases of 5, sparse to the end from some point on.

    Deviation: the authors' last dense phase is twice as long (75% to 85% of training); here all have one length.

    Args:
        density: Density of sparse phases, in (0, 1].
        phase: Length of a phase.
        start: End of the dense warm-up.
        stop: Beginning of the last sparse phase, at the latest.
        allocation: How the budget is split; by default one global threshold.
        drop: Drop score; magnitude by default.
        grown_warmup: Steps over which grown weights come to move in full.
        pattern: Which weights live and die together; every weight for itself by default.
        backend: Where weights live.
    """
    return Method(
        name="ac_dc",
        density=density,
        allocation=allocation if allocation is not None else Global(),
        drop=drop if drop is not None else scores.Magnitude(),
        grow=scores.Random(),  # all that are inactive come back at once: in what order does not matter
        clock=Every(phase, start, stop),
        fraction=Constant(0.0),
        schedule=Alternating(phase, start, stop),
        replace_step=False,
        grown_warmup=grown_warmup,
        pattern=pattern if pattern is not None else Unstructured(),
        backend=backend,
    )
