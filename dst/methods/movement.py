"""Movement pruning, hard and soft."""

from __future__ import annotations

from dst.errors import ConfigurationError
from dst.method import Method
from dst.methods.shared import documented
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import Global, Uniform
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Pattern
from dst.pieces.relaxations import Movement
from dst.pieces.schedules import Constant, Cubic, Every


@documented
def movement(
    density: float = 0.1,
    *,
    soft: bool = False,
    update_every: Duration | None = None,
    start: Duration | None = None,
    stop: Duration = 0.75,
    learning_rate: float = 0.01,
    threshold: float | None = None,
    penalty: float | None = None,
    allocation: Allocation | None = None,
    pattern: Pattern = Unstructured(),
) -> Method:
    """Movement pruning (Sanh et al. 2020, https://arxiv.org/abs/2005.07683): keep the weights that move away from zero.

    Scores S are learned with the gradient dL/dW' ⊙ W. Hard: every step activates the best scores of every layer, as
    many as a cubic schedule allows that is dense until ``start`` and at the target from ``stop`` on. Soft: a weight is
    active where sigmoid(S) exceeds ``threshold``.

    Deviations, soft: the authors choose the penalty and take the density that results. Here S is shifted, by the same
    amount everywhere, so that the density follows a cubic schedule. At ``stop`` the mask is fixed: the best scores of
    the network, exactly as many as the budget allows.

    Args:
        soft: Whether to use the variant with a threshold.
        update_every: Hard variant: steps between selections; ``None`` for 1.
        start: Hard variant: where the density begins to fall; ``None`` for 0.1.
        stop: Where the density reaches the target, and the mask is fixed.
        learning_rate: Adam's, for S.
        threshold: Soft variant: threshold on sigmoid(S), in (0, 0.5); ``None`` for 0.1.
        penalty: Soft variant: λ, times the mean of sigmoid(S) of each layer, >= 0; ``None`` for 1.
        allocation: How the budget is split over layers; ``None`` for uniform (hard) or one global threshold (soft).

    Raises:
        ConfigurationError: A setting of the other variant.
    """
    of_the_other = (
        {"update_every": update_every, "start": start} if soft else {"threshold": threshold, "penalty": penalty}
    )
    for name, value in of_the_other.items():
        if value is not None:
            raise ConfigurationError(
                f"movement: {name}={value} belongs to soft={not soft}, and this is soft={soft}: leave it out"
            )
    if soft:
        return Method(
            name="movement",
            density=density,
            allocation=allocation if allocation is not None else Global(),
            init=inits.Importance(),
            sparsify_at=stop,
            relaxation=Movement(
                learning_rate, 0.1 if threshold is None else threshold, 1.0 if penalty is None else penalty
            ),
            pattern=pattern,
        )
    start = 0.1 if start is None else start
    return Method(
        name="movement",
        density=density,
        allocation=allocation if allocation is not None else Uniform(),
        init=inits.Importance(),
        drop=scores.Importance(),
        grow=scores.Importance(),
        clock=Every(1 if update_every is None else update_every, start, stop),
        fraction=Constant(1.0),
        schedule=Cubic(1.0, start, stop),
        replace_step=False,
        relaxation=Movement(learning_rate),
        pattern=pattern,
    )
