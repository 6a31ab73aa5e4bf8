"""RigL with blocks."""

from __future__ import annotations

from dst.method import Method
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import ERK
from dst.pieces.durations import Duration
from dst.pieces.patterns import Block
from dst.pieces.protocols import Allocation, Fraction, Init, Pattern, Score
from dst.pieces.schedules import Cosine, Every


def rigl_block(
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
    backend: str = "masked",
) -> Method:
    """RigL in which tiles of the weight matrix live and die together.

    The drop and growth of RigL (Evci et al. 2020, https://arxiv.org/abs/1911.11134) by the mean of a tile's scores: the
    tiles of smallest mean magnitude are dropped, those with the largest mean abs(gradient) are grown. Blocks are what
    kernels and caches like.

    Deviations: as in ``dst.methods.rigl``; a layer's count is a multiple of the tile's weights.

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
        pattern: ``Block(4, 4)`` by default.
        backend: Where weights live.
    """
    return Method(
        name="rigl_block",
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
        pattern=pattern if pattern is not None else Block(),
        backend=backend,
    )
