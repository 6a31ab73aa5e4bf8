"""Gradual magnitude pruning."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import documented
from dst.pieces.allocation import Uniform
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, DensitySchedule, Pattern, Score
from dst.pieces.schedules import Constant, Cubic, Every
from dst.pieces.scores import Magnitude


@documented
def gmp(
    density: float = 0.1,
    *,
    initial_density: float = 1.0,
    schedule: DensitySchedule | None = None,
    update_every: Duration = 100,
    start: Duration = 0,
    stop: Duration = 0.75,
    allocation: Allocation = Uniform(),
    drop: Score = Magnitude(),
    pattern: Pattern = Unstructured(),
    backend: str = "masked",
) -> Method:
    """Gradual magnitude pruning (Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878).

    Training starts dense. Every ΔT steps the smallest weights of every layer are pruned, quickly at first and then ever
    more slowly, until the target density is reached. ``allocation=Global()`` compares the weights of all layers
    instead.

    Deviations: in the authors' code pruned weights keep their last values and may return; here they are zero and never
    return. ΔT = 100 is theirs; they choose the start and end of pruning for every network.

    Args:
        density: Final density, in (0, 1].
        start: Where pruning begins.
        stop: Where pruning ends.
    """
    return Method(
        name="gmp",
        density=density,
        allocation=allocation,
        drop=drop,
        clock=Every(update_every, start, stop),
        fraction=Constant(0.0),
        schedule=schedule if schedule is not None else Cubic(initial_density, start, stop),
        replace_step=False,
        pattern=pattern,
        backend=backend,
    )
