"""L0 regularisation by hard concrete gates."""

from __future__ import annotations

from dst.method import Method
from dst.pieces import init as inits
from dst.pieces.allocation import Global
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Pattern
from dst.pieces.relaxations import HardConcrete


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
    allocation: Allocation | None = None,
    pattern: Pattern | None = None,
) -> Method:
    """L0 regularisation (Louizos et al. 2018, https://arxiv.org/abs/1712.01312): a stochastic gate per weight.

    In training weights are multiplied by samples of hard concrete gates, in evaluation by their deterministic values;
    log α of every gate is learned, under a penalty on the expected number of open ones.

    Deviations: the authors choose λ and take what results. Here log α is pushed, by the same amount everywhere, so that
    the expected density follows a cubic schedule, and at ``stop`` the mask is fixed: the largest log α of the network,
    exactly as many as the budget has, with the deterministic gates multiplied into the weights. Gates are per weight, a
    sample lasts one optimizer step, and the optimizer's weight decay is not corrected for the gates' probabilities.

    Args:
        density: Target density, in (0, 1].
        stop: When the mask is fixed, above 0.
        learning_rate: Adam's, of log α.
        penalty: λ, times the mean probability of an open gate in each layer, >= 0.
        initial: log α at the start.
        beta: Temperature of the gates, > 0.
        gamma: Lower end of the stretched interval, < 0.
        zeta: Upper end, > 1.
        allocation: How the budget is split when the mask is fixed; by default one threshold for the network.
        pattern: Which weights live and die together; every weight for itself by default.
    """
    return Method(
        name="l0",
        density=density,
        allocation=allocation if allocation is not None else Global(),
        init=inits.Importance(),
        sparsify_at=stop,
        relaxation=HardConcrete(learning_rate, penalty, beta, gamma, zeta, initial),
        pattern=pattern if pattern is not None else Unstructured(),
    )
