"""Sparse momentum."""

from __future__ import annotations

from dst.method import Method
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import Uniform
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Fraction, Init, Pattern, Redistribution, Score
from dst.pieces.redistribute import MeanMomentum
from dst.pieces.schedules import Cosine, Every


def snfs(
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
    redistribute: Redistribution | None = None,
    replace_step: bool = False,
    regrow_dropped: bool = True,
    rescale_init: bool = False,
    grown_warmup: int = 0,
    pattern: Pattern | None = None,
    backend: str = "masked",
) -> Method:
    """Sparse networks from scratch, by sparse momentum (Dettmers & Zettlemoyer 2019, https://arxiv.org/abs/1907.04840).

    Every layer drops a share of its smallest weights. What all layers have dropped comes back where the mean momentum of
    the active weights is largest, and within a layer where that of the inactive ones is. Momentum is a mean of the dense
    gradients, which are computed at every step.

    Deviations: the mean of gradients is the engine's own (``scores.Momentum``), since the optimizer's sees masked gradients.
    The authors update once an epoch (pass ``update_every=`` the steps of one), lower the share that nearly dense layers
    drop, fill no layer beyond 99%, and round shares up; here rounding is exact. A layer never loses its last connection.

    Args:
        density: Target density, in (0, 1].
        update_every: Steps between updates.
        start: First step that may update.
        stop: First step that may not.
        fraction: Share of every layer's connections dropped; ``Cosine(0.5)`` by default.
        allocation: How the budget is split at first; uniform by default.
        init: First mask; random by default.
        drop: Drop score; magnitude by default.
        grow: Grow score; momentum by default.
        redistribute: Where budget goes; ``MeanMomentum()`` by default.
        replace_step: Whether an update takes the place of a step.
        regrow_dropped: Whether just-dropped connections are candidates for growth.
        rescale_init: Scale initial weights to the active fan-in.
        grown_warmup: Steps over which grown weights come to move in full.
        pattern: Which weights live and die together; every weight for itself by default.
        backend: Where weights live.
    """
    return Method(
        name="snfs",
        density=density,
        allocation=allocation if allocation is not None else Uniform(),
        init=init if init is not None else inits.Random(),
        drop=drop if drop is not None else scores.Magnitude(),
        grow=grow if grow is not None else scores.Momentum(),
        clock=Every(update_every, start, stop),
        fraction=fraction if fraction is not None else Cosine(0.5),
        redistribute=redistribute if redistribute is not None else MeanMomentum(),
        replace_step=replace_step,
        regrow_dropped=regrow_dropped,
        rescale_init=rescale_init,
        grown_warmup=grown_warmup,
        pattern=pattern if pattern is not None else Unstructured(),
        backend=backend,
    )
