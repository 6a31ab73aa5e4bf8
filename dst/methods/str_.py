"""STR: soft threshold reparameterization."""

from __future__ import annotations

from dst.method import Method
from dst.pieces import init as inits
from dst.pieces.allocation import Global
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Pattern
from dst.pieces.relaxations import LearnedThreshold


def str_(
    density: float = 0.1,
    *,
    stop: Duration = 0.75,
    initial: float = -8.0,
    decay: float = 1e-4,
    allocation: Allocation | None = None,
    pattern: Pattern | None = None,
) -> Method:
    """Soft threshold reparameterization (Kusupati et al. 2020, https://arxiv.org/abs/2002.03231).

    The network computes with sign(w) · relu(abs(w) − sigmoid(s)), and every layer's s is learned.

    Deviations: the authors find the initial s and its weight decay for each density and take what results. Here s is
    pushed, by the same amount in all layers, so that the density follows a cubic schedule, and at ``stop`` the mask is
    fixed: the largest effective weights of the network, exactly as many as the budget has. Training goes on with them,
    without a threshold. s is moved by plain gradient descent at the optimizer's learning rate.

    Args:
        density: Target density, in (0, 1].
        stop: When the mask is fixed, above 0.
        initial: s at the start.
        decay: Weight decay of s, >= 0.
        allocation: How the budget is split when the mask is fixed; by default one threshold for the network.
        pattern: Which weights live and die together; every weight for itself by default.
    """
    return Method(
        name="str",
        density=density,
        allocation=allocation if allocation is not None else Global(),
        init=inits.Importance(),
        sparsify_at=stop,
        relaxation=LearnedThreshold(initial, decay),
        pattern=pattern if pattern is not None else Unstructured(),
    )
