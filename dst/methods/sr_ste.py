"""SR-STE: sparse-refined straight-through estimator."""

from __future__ import annotations

from dst.method import Method
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import Uniform
from dst.pieces.durations import Duration
from dst.pieces.patterns import NM
from dst.pieces.protocols import Allocation, Init, Pattern
from dst.pieces.relaxations import StraightThrough
from dst.pieces.schedules import Constant, Every


def sr_ste(
    density: float = 0.1,
    *,
    update_every: Duration = 1,
    start: Duration = 0,
    stop: Duration = 1.0,
    decay: float = 2e-4,
    allocation: Allocation | None = None,
    init: Init | None = None,
    pattern: Pattern | None = None,
) -> Method:
    """SR-STE (Zhou et al. 2021, https://arxiv.org/abs/2102.04010, equation 9).

    The forward pass uses the N largest of every M consecutive weights; the gradient moves all weights, and inactive ones
    are shrunk: g + λ · (1 − m) ⊙ w. λ = 0 is the plain straight-through estimator, ``pattern=Unstructured()`` gives every
    layer one budget.

    Deviations: N:M follows from the density (0.5 is 1:2, 0.1 is 1:10) unless it is given. λ · (1 − m) ⊙ w is
    added as the optimizer's step begins, behind clipping; the authors add it in the backward pass.

    Args:
        density: Target density, in (0, 1].
        update_every: Steps between selections.
        start: First step that may select.
        stop: First step that may not.
        decay: λ, >= 0.
        allocation: How the budget is split; uniform by default.
        init: First mask; the largest weights by default.
        pattern: Which weights live and die together; N:M windows by default, with the numbers that the density says.
    """
    return Method(
        name="sr_ste",
        density=density,
        allocation=allocation if allocation is not None else Uniform(),
        init=init if init is not None else inits.Magnitude(),
        drop=scores.Magnitude(),
        grow=scores.Magnitude(),
        clock=Every(update_every, start, stop),
        fraction=Constant(1.0),
        replace_step=False,
        relaxation=StraightThrough(inactive_decay=decay),
        pattern=pattern if pattern is not None else NM(),
    )
