"""Deep rewiring."""

from __future__ import annotations

from dst.method import Method
from dst.pieces import init as inits
from dst.pieces import scores
from dst.pieces.allocation import ERK
from dst.pieces.amounts import BelowZero
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.perturbations import Langevin
from dst.pieces.protocols import Allocation, Init, Pattern
from dst.pieces.schedules import Constant, Every


def deep_r(
    density: float = 0.1,
    *,
    l1: float = 1e-5,
    temperature: float = 2.5e-11,
    update_every: Duration = 1,
    start: Duration = 0,
    stop: Duration = 1.0,
    allocation: Allocation | None = None,
    init: Init | None = None,
    rescale_init: bool = False,
    pattern: Pattern | None = None,
    backend: str = "masked",
) -> Method:
    """DeepR, deep rewiring (Bellec et al. 2018, https://arxiv.org/abs/1711.05136, Algorithm 1).

    Every connection keeps a sign, and its weight walks at random on that side of zero: by gradient, L1 pull and noise.
    One that crosses zero goes, and another takes its place at random, at zero. Use it with plain SGD. The defaults of l1 and
    temperature are those of the authors' code for MNIST, at its learning rate of 0.5.

    Deviations: an update comes before a step's gradients are used and not after, so that a weight has crossed zero for one
    forward pass before it goes. Connections that have just gone are no candidates, and grown ones start at 0 instead
    of 1e-12. First weights keep their values, and their signs are kept. The number of active connections is that of the
    budget in every layer; layers that are wholly dense stay so, whatever their signs.

    Args:
        density: Target density, in (0, 1].
        l1: α, the pull to zero.
        temperature: T of the noise √(2 · η · T) that a step adds.
        update_every: Steps between updates.
        start: First step that may update.
        stop: First step that may not.
        allocation: How the budget is split; ERK by default.
        init: First mask; random by default.
        rescale_init: Scale initial weights to the active fan-in.
        pattern: Which weights live and die together; every weight for itself by default.
        backend: Where weights live.
    """
    return Method(
        name="deep_r",
        density=density,
        allocation=allocation if allocation is not None else ERK(),
        init=init if init is not None else inits.Random(),
        drop=scores.KeptSign(),
        grow=scores.Random(),
        clock=Every(update_every, start, stop),
        fraction=Constant(0.0),
        amount=BelowZero(),
        perturb=Langevin(l1, temperature),
        replace_step=False,
        regrow_dropped=False,
        rescale_init=rescale_init,
        pattern=pattern if pattern is not None else Unstructured(),
        backend=backend,
    )
