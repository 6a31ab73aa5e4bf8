"""Dynamic sparse reparameterization."""

from __future__ import annotations

from dst.method import Method
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import Uniform
from dst.pieces.amounts import BelowThreshold
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Amount, Init, Pattern, Redistribution, Score
from dst.pieces.redistribute import Survivors
from dst.pieces.schedules import Constant, Every


def dsr(
    density: float = 0.1,
    *,
    update_every: Duration = 100,
    start: Duration = 0,
    stop: Duration = 1.0,
    amount: Amount | None = None,
    allocation: Allocation | None = None,
    init: Init | None = None,
    drop: Score | None = None,
    grow: Score | None = None,
    redistribute: Redistribution | None = None,
    replace_step: bool = False,
    rescale_init: bool = False,
    grown_warmup: int = 0,
    pattern: Pattern | None = None,
    backend: str = "masked",
) -> Method:
    """Dynamic sparse reparameterization (Mostafa & Wang 2019, https://arxiv.org/abs/1902.05967, Algorithm 1).

    Weights below one threshold for the whole network go. As many come back at random positions, at zero, in layers in
    proportion to what they have left. The threshold doubles or halves so that an update drops about its target.

    Deviations: the target is a share of the active connections, where the authors give a number for each network; connections
    that have just gone are no candidates; no layer loses more than nine tenths of its connections at once. The authors
    update ever more rarely; here distances are equal.

    Args:
        density: Target density, in (0, 1].
        update_every: Steps between updates.
        start: First step that may update.
        stop: First step that may not.
        amount: How many connections go; ``BelowThreshold()`` by default.
        allocation: How the budget is split at first; uniform by default.
        init: First mask; random by default.
        drop: Drop score; magnitude by default.
        grow: Grow score; random by default.
        redistribute: Where budget goes; ``Survivors()`` by default.
        replace_step: Whether an update takes the place of a step.
        rescale_init: Scale initial weights to the active fan-in.
        grown_warmup: Steps over which grown weights come to move in full.
        pattern: Which weights live and die together; every weight for itself by default.
        backend: Where weights live.
    """
    return Method(
        name="dsr",
        density=density,
        allocation=allocation if allocation is not None else Uniform(),
        init=init if init is not None else inits.Random(),
        drop=drop if drop is not None else scores.Magnitude(),
        grow=grow if grow is not None else scores.Random(),
        clock=Every(update_every, start, stop),
        fraction=Constant(0.0),
        amount=amount if amount is not None else BelowThreshold(),
        redistribute=redistribute if redistribute is not None else Survivors(),
        replace_step=replace_step,
        regrow_dropped=False,
        rescale_init=rescale_init,
        grown_warmup=grown_warmup,
        pattern=pattern if pattern is not None else Unstructured(),
        backend=backend,
    )
