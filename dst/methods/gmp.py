"""Gradual magnitude pruning."""

from __future__ import annotations

from dst.method import Method
from dst.pieces.allocation import Uniform
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, DensitySchedule, Pattern, Score
from dst.pieces.schedules import Constant, Cubic, Every
from dst.pieces.scores import Magnitude


def gmp(
    density: float = 0.1,
    *,
    initial_density: float = 1.0,
    schedule: DensitySchedule | None = None,
    update_every: Duration = 100,
    start: Duration = 0,
    stop: Duration = 0.75,
    allocation: Allocation | None = None,
    drop: Score | None = None,
    pattern: Pattern | None = None,
    backend: str = "masked",
) -> Method:
    """Gradual magnitude pruning (Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878).

    Training starts dense. Every ΔT steps the smallest weights of every layer go, fast at first and then ever more slowly,
    until the density is reached. ``allocation=Global()`` compares the weights of all layers instead.

    Deviations: in the authors' code pruned weights keep their last values and may return; here they are zero, and gone for
    good. ΔT is 100 steps there too; where pruning begins and ends they choose for every network.

    Args:
        density: Final density, in (0, 1].
        initial_density: Density at first, in (0, 1].
        schedule: Density over time, instead of the cubic one from ``initial_density``, ``start`` to ``stop``.
        update_every: ΔT, steps between updates.
        start: Where pruning begins.
        stop: Where it ends.
        allocation: How the budget is split; uniform by default.
        drop: Drop score; magnitude by default.
        pattern: Which weights live and die together; every weight for itself by default.
        backend: Where weights live.
    """
    return Method(
        name="gmp",
        density=density,
        allocation=allocation if allocation is not None else Uniform(),
        drop=drop if drop is not None else Magnitude(),
        clock=Every(update_every, start, stop),
        fraction=Constant(0.0),
        schedule=schedule if schedule is not None else Cubic(initial_density, start, stop),
        replace_step=False,
        pattern=pattern if pattern is not None else Unstructured(),
        backend=backend,
    )
