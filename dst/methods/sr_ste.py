"""SR-STE: sparse-refined straight-through estimator."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import documented
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import Uniform
from dst.pieces.durations import Duration
from dst.pieces.patterns import NM
from dst.pieces.protocols import Allocation, Init, Pattern
from dst.pieces.relaxations import StraightThrough
from dst.pieces.schedules import Constant, Every


@documented
def sr_ste(
    density: float = 0.1,
    *,
    update_every: Duration = 1,
    start: Duration = 0,
    stop: Duration = 1.0,
    decay: float = 2e-4,
    allocation: Allocation = Uniform(),
    init: Init = inits.Magnitude(),
    pattern: Pattern = NM(),
) -> Method:
    """SR-STE (Zhou et al. 2021, https://arxiv.org/abs/2102.04010, equation 9).

    The forward pass uses the N largest of every M consecutive weights. The gradient updates all weights, and inactive
    ones decay: g + λ · (1 − m) ⊙ w. λ = 0 is the plain straight-through estimator; ``pattern=Unstructured()`` gives
    every layer one budget.

    Deviations: N:M follows from the density (0.5 is 1:2, 0.1 is 1:10) unless the pattern sets it. λ · (1 − m) ⊙ w is
    added at the start of the optimizer's step, after clipping; the authors add it in the backward pass.

    Args:
        update_every: Steps between selections.
        start: First step that may select.
        stop: First step that may no longer select.
        decay: λ, >= 0.
    """
    return Method(
        name="sr_ste",
        density=density,
        allocation=allocation,
        init=init,
        drop=scores.Magnitude(),
        grow=scores.Magnitude(),
        clock=Every(update_every, start, stop),
        fraction=Constant(1.0),
        replace_step=False,
        relaxation=StraightThrough(inactive_decay=decay),
        pattern=pattern,
    )
