"""RigL with in-time over-parameterization."""

from __future__ import annotations

from dataclasses import replace

from dst.method import Method
from dst.methods.rigl import rigl
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Fraction, Init, Pattern, Score
from dst.pieces.schedules import Cosine


def rigl_itop(
    density: float = 0.1,
    *,
    update_every: Duration = 0.04,
    start: Duration = 0.04,
    stop: Duration = 1.0,
    fraction: Fraction | None = None,
    allocation: Allocation | None = None,
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
    """RigL-ITOP: RigL that explores (Liu et al. 2021, https://arxiv.org/abs/2102.02887).

    Fewer, larger and longer updates than RigL's: new connections have time to grow before they are judged, and the
    network has in the end tried most of its weights. ΔT = 4000 steps in the authors' settings for CIFAR, of 97,750 steps
    in all; here it is the same share of training, so that short trainings explore too.

    Deviations: the authors' fraction ends at 0.005 instead of 0. They update after the step, here before it.

    Args:
        density: Target density, in (0, 1].
        update_every: ΔT, steps between updates.
        start: First step that may update.
        stop: First step that may not.
        fraction: Share of the connections replaced; ``Cosine(0.5)`` by default.
        allocation: How the budget is split; ERK by default.
        init: First mask; random by default.
        drop: Drop score; magnitude by default.
        grow: Grow score; gradient by default.
        replace_step: Whether an update takes the place of a step.
        regrow_dropped: Whether just-dropped connections are candidates for growth.
        rescale_init: Scale initial weights to the active fan-in.
        grown_warmup: Steps over which grown weights come to move in full.
        pattern: Which weights live and die together; every weight for itself by default.
        backend: Where weights live.
    """
    method = rigl(
        density,
        update_every=update_every,
        start=start,
        stop=stop,
        fraction=fraction if fraction is not None else Cosine(0.5),
        allocation=allocation,
        init=init,
        drop=drop,
        grow=grow,
        replace_step=replace_step,
        regrow_dropped=regrow_dropped,
        rescale_init=rescale_init,
        grown_warmup=grown_warmup,
        pattern=pattern if pattern is not None else Unstructured(),
        backend=backend,
    )
    return replace(method, name="rigl_itop")
