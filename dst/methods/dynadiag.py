"""Diagonal sparsity."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import compose, documented
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import ERK
from dst.pieces.durations import Duration
from dst.pieces.patterns import Diagonal
from dst.pieces.protocols import Allocation, Fraction, Init, Pattern, Score
from dst.pieces.schedules import Cosine


@documented
def dynadiag(
    density: float = 0.1,
    *,
    update_every: Duration = 100,
    start: Duration = 0,
    stop: Duration = 0.75,
    fraction: Fraction = Cosine(0.3),
    allocation: Allocation = ERK(),
    init: Init = inits.Random(),
    drop: Score = scores.Magnitude(),
    grow: Score = scores.Gradient(),
    replace_step: bool = True,
    regrow_dropped: bool = True,
    rescale_init: bool = False,
    pattern: Pattern = Diagonal(),
    backend: str = "masked",
) -> Method:
    """DynaDiag-style: whole wrapped diagonals of the weight matrix are dropped and grown.

    The structure is that of DynaDiag (Tyagi et al. 2025, https://arxiv.org/abs/2506.11449): a layer keeps few of its
    diagonals, so that its products are as regular in the backward pass as in the forward pass.

    Deviation: the authors learn which diagonals stay by a soft top-k of one importance parameter per diagonal, whose
    temperature falls over training, and inactive diagonals receive gradients through it. Here diagonals are updated as
    connections are in RigL: those of smallest mean magnitude are dropped, those with the largest mean abs(gradient) are
    grown, and no parameter is added.
    """
    return compose("dynadiag", **locals())
