"""One-shot pruning: a mask that is fixed once."""

from __future__ import annotations

from dst.method import Method
from dst.pieces import init as inits
from dst.pieces.allocation import Global
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Init, Pattern


def static(
    density: float = 0.1,
    *,
    init: Init | None = None,
    sparsify_at: Duration | None = None,
    allocation: Allocation | None = None,
    pattern: Pattern | None = None,
    backend: str = "masked",
) -> Method:
    """A mask that is fixed once and never changes.

    By default the network trains dense for a quarter of the steps, is pruned once by global magnitude, and goes on
    (one-shot magnitude pruning; Han et al. 2015, https://arxiv.org/abs/1506.02626, prune at the end of training
    instead). ``init=Snip()`` prunes at the first batch (Lee et al. 2019, https://arxiv.org/abs/1810.02340), and
    ``init=FromFile(path)`` takes a mask that exists.

    Args:
        density: Target density, in (0, 1].
        init: What the mask is made from.
        sparsify_at: When it is made: 0.25 by default for magnitude, the start for everything else.
        allocation: How the budget is split; by default one global threshold.
        pattern: Which weights live and die together; every weight for itself by default.
        backend: Where weights live.
    """
    init = init if init is not None else inits.Magnitude()
    if sparsify_at is None:
        sparsify_at = 0.25 if isinstance(init, inits.Magnitude) else 0
    return Method(
        name="static",
        density=density,
        init=init,
        sparsify_at=sparsify_at,
        allocation=allocation if allocation is not None else Global(),
        pattern=pattern if pattern is not None else Unstructured(),
        backend=backend,
    )
