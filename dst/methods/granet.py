"""Gradual pruning with zero-cost neuroregeneration."""

from __future__ import annotations

from dst.method import Method
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import ERK, Global
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, DensitySchedule, Fraction, Init, Pattern, Score
from dst.pieces.schedules import Cosine, Cubic, Every


def granet(
    density: float = 0.1,
    *,
    initial_density: float = 1.0,
    schedule: DensitySchedule | None = None,
    update_every: Duration = 100,
    start: Duration = 0,
    stop: Duration = 0.75,
    fraction: Fraction | None = None,
    allocation: Allocation | None = None,
    first_allocation: Allocation | None = None,
    init: Init | None = None,
    drop: Score | None = None,
    grow: Score | None = None,
    replace_step: bool = False,
    regrow_dropped: bool = True,
    rescale_init: bool = False,
    grown_warmup: int = 0,
    pattern: Pattern | None = None,
    backend: str = "masked",
) -> Method:
    """GraNet, gradual pruning with neuroregeneration (Liu et al. 2021, https://arxiv.org/abs/2106.10404, Algorithm 1).

    At every update the network is pruned by global magnitude to a density that falls by the cubic schedule. Then every layer
    drops a share of its smallest weights, and regrows as many by gradient. Training starts dense, or at
    ``initial_density=0.5`` from a random sparse network, as the authors' sparse-to-sparse version does.

    Deviations: the authors count both phases in epochs, and update after the step, here before it. A layer keeps one
    connection at least. The density is exact at every update, and the method's own from the last on.

    Args:
        density: Final density, in (0, 1].
        initial_density: Density at first, in (0, 1].
        schedule: Density over time, instead of the cubic one from ``initial_density``, ``start`` to ``stop``.
        update_every: Steps between updates.
        start: First step that may update, and where the density begins to move.
        stop: Where the density has arrived, and the last update happens.
        fraction: Share of the connections regrown; ``Cosine(0.5)`` by default.
        allocation: How the budget is split; by default one global threshold.
        first_allocation: How that of a sparse start is; ERK by default.
        init: First mask of a sparse start; random by default.
        drop: Drop score; magnitude by default.
        grow: Grow score; gradient by default.
        replace_step: Whether an update takes the place of a step.
        regrow_dropped: Whether just-dropped connections are candidates for growth.
        rescale_init: Scale initial weights to the active fan-in of the first mask.
        grown_warmup: Steps over which grown weights come to move in full.
        pattern: Which weights live and die together; every weight for itself by default.
        backend: Where weights live.
    """
    return Method(
        name="granet",
        density=density,
        allocation=allocation if allocation is not None else Global(),
        first_allocation=first_allocation if first_allocation is not None else ERK(),
        init=init if init is not None else inits.Random(),
        drop=drop if drop is not None else scores.Magnitude(),
        grow=grow if grow is not None else scores.Gradient(),
        clock=Every(update_every, start, stop),
        fraction=fraction if fraction is not None else Cosine(0.5),
        schedule=schedule if schedule is not None else Cubic(initial_density, start, stop),
        replace_step=replace_step,
        regrow_dropped=regrow_dropped,
        rescale_init=rescale_init,
        grown_warmup=grown_warmup,
        pattern=pattern if pattern is not None else Unstructured(),
        backend=backend,
    )
