"""Gradual pruning with zero-cost neuroregeneration."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import documented
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import ERK, Global
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, DensitySchedule, Fraction, Init, Pattern, Score
from dst.pieces.schedules import Cosine, Cubic, Every


@documented
def granet(
    density: float = 0.1,
    *,
    initial_density: float = 1.0,
    schedule: DensitySchedule | None = None,
    update_every: Duration = 100,
    start: Duration = 0,
    stop: Duration = 0.75,
    fraction: Fraction = Cosine(0.5),
    allocation: Allocation = Global(),
    first_allocation: Allocation = ERK(),
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
    """GraNet, gradual pruning with neuroregeneration (Liu et al. 2021, https://arxiv.org/abs/2106.10404, Algorithm 1).

    Every update first prunes the network by global magnitude to the density of a cubic schedule. Then every layer drops
    a share of its smallest weights and regrows as many by gradient. Training starts dense, or with
    ``initial_density=0.5`` from a random sparse network, as in the authors' sparse-to-sparse version.

    Deviations: the authors count both phases in epochs, and update after the step, here before it. A layer keeps at
    least one connection. The density is exact at every update, and equals ``density`` from the last update on.

    Args:
        density: Final density, in (0, 1].
        start: First step that may update, and where the density begins to change.
        stop: Last update, where the density reaches ``density``.
        fraction: Share of a layer's active connections that an update regrows.
        first_allocation: How the initial budget of a sparse start is split.
        init: How the first mask of a sparse start is chosen.
        rescale_init: Whether to scale initial weights to the active fan-in of the first mask.
    """
    return Method(
        name="granet",
        density=density,
        allocation=allocation,
        first_allocation=first_allocation,
        init=init,
        drop=drop,
        grow=grow,
        clock=Every(update_every, start, stop),
        fraction=fraction,
        schedule=schedule if schedule is not None else Cubic(initial_density, start, stop),
        replace_step=replace_step,
        regrow_dropped=regrow_dropped,
        rescale_init=rescale_init,
        grown_warmup=grown_warmup,
        pattern=pattern,
        backend=backend,
    )
