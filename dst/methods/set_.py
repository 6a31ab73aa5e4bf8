"""Sparse evolutionary training."""

from __future__ import annotations

from dst.method import Method
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import ERK
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Fraction, Init, Pattern, Score
from dst.pieces.schedules import Constant, Every


def set_(
    density: float = 0.1,
    *,
    update_every: Duration = 100,
    start: Duration = 0,
    stop: Duration = 1.0,
    fraction: Fraction | None = None,
    allocation: Allocation | None = None,
    init: Init | None = None,
    drop: Score | None = None,
    grow: Score | None = None,
    replace_step: bool = False,
    regrow_dropped: bool = True,
    rescale_init: bool = False,
    pattern: Pattern | None = None,
    grown_warmup: int = 0,
    backend: str = "masked",
) -> Method:
    """Sparse evolutionary training (Mocanu et al. 2018, https://arxiv.org/abs/1707.04780).

    Drops the weights nearest zero of each sign, grows as many at random. The fraction ζ = 0.3 is constant and updates
    go on to the end, as published.

    Deviations: the authors update once per epoch (pass ``update_every=`` the steps of one), after the last step of it,
    and give grown connections small random weights; here they start at zero, as RigL's code has it for SET. The authors
    allocate by ER; ERK is the same for fully connected layers.

    Args:
        density: Target density, in (0, 1].
        update_every: Steps between updates.
        start: First step that may update.
        stop: First step that may not.
        fraction: Share of the connections replaced; ``Constant(0.3)`` by default.
        allocation: How the budget is split; ERK by default.
        init: First mask; random by default.
        drop: Drop score; magnitude per sign by default.
        grow: Grow score; random by default.
        replace_step: Whether an update takes the place of a step.
        regrow_dropped: Whether just-dropped connections are candidates for growth.
        rescale_init: Scale initial weights to the active fan-in.
        pattern: Which weights live and die together; every weight for itself by default.
        grown_warmup: Steps over which grown weights come to move in full.
        backend: Where weights live.
    """
    return Method(
        name="set",
        density=density,
        allocation=allocation if allocation is not None else ERK(),
        init=init if init is not None else inits.Random(),
        drop=drop if drop is not None else scores.SignedMagnitude(),
        grow=grow if grow is not None else scores.Random(),
        clock=Every(update_every, start, stop),
        fraction=fraction if fraction is not None else Constant(0.3),
        replace_step=replace_step,
        regrow_dropped=regrow_dropped,
        rescale_init=rescale_init,
        pattern=pattern if pattern is not None else Unstructured(),
        grown_warmup=grown_warmup,
        backend=backend,
    )
