"""RigL with blocks."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import compose, documented
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import ERK
from dst.pieces.durations import Duration
from dst.pieces.patterns import Block
from dst.pieces.protocols import Allocation, Fraction, Init, Pattern, Score
from dst.pieces.schedules import Cosine


@documented
def rigl_block(
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
    pattern: Pattern = Block(),
    backend: str = "masked",
) -> Method:
    """RigL with blocks: the weights of a tile of the weight matrix are active together.

    Drops and grows tiles as RigL (Evci et al. 2020, https://arxiv.org/abs/1911.11134) does weights, by the mean of a
    tile's scores: the tiles of smallest mean magnitude are dropped, those with the largest mean abs(gradient) are
    grown. Blocks suit kernels and caches.

    Deviations: as in ``dst.methods.rigl``; a layer's count is a multiple of the tile's weights.
    """
    return compose("rigl_block", **locals())
