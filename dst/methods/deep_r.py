"""Deep rewiring."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import documented
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import ERK
from dst.pieces.amounts import BelowZero
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.perturbations import Langevin
from dst.pieces.protocols import Allocation, Init, Pattern
from dst.pieces.schedules import Constant, Every


@documented
def deep_r(
    density: float = 0.1,
    *,
    l1: float = 1e-5,
    temperature: float = 2.5e-11,
    update_every: Duration = 1,
    start: Duration = 0,
    stop: Duration = 1.0,
    allocation: Allocation = ERK(),
    init: Init = inits.Random(),
    rescale_init: bool = False,
    pattern: Pattern = Unstructured(),
    backend: str = "masked",
) -> Method:
    """DeepR, deep rewiring (Bellec et al. 2018, https://arxiv.org/abs/1711.05136, Algorithm 1).

    Every connection keeps its sign, and its weight does a random walk on that side of zero, driven by gradient, L1
    penalty and noise. A connection whose weight crosses zero is dropped, and a random one is grown at zero. Use it with
    plain SGD. The defaults of ``l1`` and ``temperature`` are those of the authors' code for MNIST, at its learning rate
    of 0.5.

    Deviations: an update comes before the step uses its gradients, not after, so a weight that has crossed zero is used
    in one more forward pass. Connections dropped in an update are not candidates for its growth, and grown ones start
    at 0 instead of 1e-12. Initial weights keep their values, and define the signs. Every layer's number of active
    connections equals its budget; fully dense layers stay dense, whatever their signs.

    Args:
        l1: α, the strength of the L1 penalty.
        temperature: T of the noise √(2 · η · T) that a step adds.
    """
    return Method(
        name="deep_r",
        density=density,
        allocation=allocation,
        init=init,
        drop=scores.KeptSign(),
        grow=scores.Random(),
        clock=Every(update_every, start, stop),
        fraction=Constant(0.0),
        amount=BelowZero(),
        perturb=Langevin(l1, temperature),
        replace_step=False,
        regrow_dropped=False,
        rescale_init=rescale_init,
        pattern=pattern,
        backend=backend,
    )
