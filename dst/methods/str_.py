"""STR: soft threshold reparameterization."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import documented
from dst.pieces import init as inits
from dst.pieces.allocation import Global
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Pattern
from dst.pieces.relaxations import LearnedThreshold


@documented
def str_(
    density: float = 0.1,
    *,
    stop: Duration = 0.75,
    initial: float = -8.0,
    decay: float = 1e-4,
    allocation: Allocation = Global(),
    pattern: Pattern = Unstructured(),
) -> Method:
    """Soft threshold reparameterization (Kusupati et al. 2020, https://arxiv.org/abs/2002.03231).

    The network computes with sign(w) · relu(abs(w) − sigmoid(s)), and learns s for every layer.

    Deviations: the authors search the initial s and its weight decay for each density and take the density that
    results. Here s is shifted, by the same amount in all layers, so that the density follows a cubic schedule. At
    ``stop`` the mask is fixed: the largest effective weights of the network, exactly as many as the budget allows.
    Training continues from them, without a threshold. Plain gradient descent updates s, at the optimizer's learning
    rate.

    Args:
        stop: When the mask is fixed, above 0.
        initial: s at the start.
        decay: Weight decay of s, >= 0.
        allocation: How the budget is split over layers when the mask is fixed.
    """
    return Method(
        name="str",
        density=density,
        allocation=allocation,
        init=inits.Importance(),
        sparsify_at=stop,
        relaxation=LearnedThreshold(initial, decay),
        pattern=pattern,
    )
