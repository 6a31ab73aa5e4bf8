"""RigL, the rigged lottery."""

from __future__ import annotations

from dst.method import Method
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import ERK
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Fraction, Init, Pattern, Score
from dst.pieces.schedules import Cosine, Every


def rigl(
    density: float = 0.1,
    *,
    update_every: Duration = 100,
    start: Duration = 0,
    stop: Duration = 0.75,
    fraction: Fraction | None = None,
    allocation: Allocation | None = None,
    init: Init | None = None,
    drop: Score | None = None,
    grow: Score | None = None,
    replace_step: bool = True,
    regrow_dropped: bool = True,
    rescale_init: bool = False,
    pattern: Pattern | None = None,
    grown_warmup: int = 0,
    backend: str = "masked",
) -> Method:
    """RigL, the rigged lottery (Evci et al. 2020, https://arxiv.org/abs/1911.11134, Algorithm 1).

    Every ΔT steps the weights of smallest magnitude are dropped and those with the largest dense gradient are grown, at
    zero. The defaults are the authors' code's: ERK, ΔT = 100, cosine from α = 0.3 to the end of updates at 75% of
    training, the update replacing the optimizer's step, and a just-dropped connection free to regrow with its value.

    Deviation: ties are broken by seeded random choice, where the authors add noise of standard deviation 1e-5 to the
    drop scores.

    Args:
        density: Target density, in (0, 1].
        update_every: ΔT, steps between updates.
        start: First step that may update.
        stop: First step that may not.
        fraction: Share of the connections replaced; ``Cosine(0.3)`` by default.
        allocation: How the budget is split; ERK by default.
        init: First mask; random by default.
        drop: Drop score; magnitude by default.
        grow: Grow score; gradient by default.
        replace_step: Whether an update takes the place of a step.
        regrow_dropped: Whether just-dropped connections are candidates for growth.
        rescale_init: Scale initial weights to the active fan-in.
        pattern: Which weights live and die together; every weight for itself by default.
        grown_warmup: Steps over which grown weights come to move in full.
        backend: Where weights live.
    """
    return Method(
        name="rigl",
        density=density,
        allocation=allocation if allocation is not None else ERK(),
        init=init if init is not None else inits.Random(),
        drop=drop if drop is not None else scores.Magnitude(),
        grow=grow if grow is not None else scores.Gradient(),
        clock=Every(update_every, start, stop),
        fraction=fraction if fraction is not None else Cosine(0.3),
        replace_step=replace_step,
        regrow_dropped=regrow_dropped,
        rescale_init=rescale_init,
        pattern=pattern if pattern is not None else Unstructured(),
        grown_warmup=grown_warmup,
        backend=backend,
    )
