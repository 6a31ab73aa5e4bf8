"""L0 regularisation by hard concrete gates."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import documented
from dst.pieces import init as inits
from dst.pieces.allocation import Global
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Pattern
from dst.pieces.relaxations import HardConcrete


@documented
def l0(
    density: float = 0.1,
    *,
    stop: Duration = 0.75,
    learning_rate: float = 0.05,
    penalty: float = 1.0,
    initial: float = 1.5,
    beta: float = 2 / 3,
    gamma: float = -0.1,
    zeta: float = 1.1,
    allocation: Allocation = Global(),
    pattern: Pattern = Unstructured(),
) -> Method:
    """L0 regularisation (Louizos et al. 2018, https://arxiv.org/abs/1712.01312): a stochastic gate per weight.

    Training multiplies the weights by samples of hard concrete gates, evaluation by the gates' deterministic values.
    The log α of every gate is learned, under a penalty on the expected number of open gates.

    Deviations: the authors choose λ and take the density that results. Here log α is shifted, by the same amount
    everywhere, so that the expected density follows a cubic schedule. At ``stop`` the mask is fixed: the largest log α
    of the network, exactly as many as the budget allows, with the deterministic gates multiplied into the weights.
    Gates are per weight, a sample lasts one optimizer step, and the optimizer's weight decay is not corrected for the
    gates' probabilities.

    Args:
        stop: When the mask is fixed, above 0.
        learning_rate: Adam's, for log α.
        penalty: λ, times the mean probability of an open gate in each layer, >= 0.
        initial: log α at the start.
        beta: Temperature of the gates, > 0.
        gamma: Lower end of the stretched interval, < 0.
        zeta: Upper end of the stretched interval, > 1.
        allocation: How the budget is split over layers when the mask is fixed.
    """
    return Method(
        name="l0",
        density=density,
        allocation=allocation,
        init=inits.Importance(),
        sparsify_at=stop,
        relaxation=HardConcrete(learning_rate, penalty, beta, gamma, zeta, initial),
        pattern=pattern,
    )
