"""Diagonal sparsity."""

from __future__ import annotations

from dst.method import Method
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import ERK
from dst.pieces.durations import Duration
from dst.pieces.patterns import Diagonal
from dst.pieces.protocols import Allocation, Fraction, Init, Pattern, Score
from dst.pieces.schedules import Cosine, Every


def dynadiag(
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
    """DynaDiag-style: whole wrapped diagonals of the weight matrix are dropped and grown.

    The structure is that of DynaDiag (Tyagi et al. 2025, https://arxiv.org/abs/2506.11449): a layer keeps few of its
    diagonals, so that its products are as regular forward as backward.

    Deviation: the authors learn which diagonals stay by a soft top-k of one importance parameter per diagonal, whose
    temperature falls over training, and diagonals that are off receive gradients through it. Here diagonals move as
    connections do in RigL: those of smallest mean magnitude are dropped, those with the largest mean abs(gradient) are
    grown, and no parameter is added.

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
        pattern: ``Diagonal()`` by default.
        backend: Where weights live.
    """
    return Method(
        name="dynadiag",
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
        pattern=pattern if pattern is not None else Diagonal(),
        backend=backend,
    )
