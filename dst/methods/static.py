"""One-shot pruning: a mask that is fixed once."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import documented
from dst.pieces import init as inits
from dst.pieces.allocation import Global
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Init, Pattern


@documented
def static(
    density: float = 0.1,
    *,
    init: Init = inits.Magnitude(),
    sparsify_at: Duration | None = None,
    allocation: Allocation = Global(),
    pattern: Pattern = Unstructured(),
    backend: str = "masked",
) -> Method:
    """A mask that is fixed once and never changes.

    By default the network trains dense for a quarter of the steps, is pruned once by global magnitude, and trains on
    (one-shot magnitude pruning; Han et al. 2015, https://arxiv.org/abs/1506.02626, prune at the end of training
    instead). ``init=Snip()`` prunes at the first batch (Lee et al. 2019, https://arxiv.org/abs/1810.02340), and
    ``init=FromFile(path)`` loads saved masks.

    Args:
        init: How the mask is chosen.
        sparsify_at: When the mask is made; ``None`` for 0.25 with ``Magnitude()``, 0 with any other init.
    """
    if sparsify_at is None:
        sparsify_at = 0.25 if isinstance(init, inits.Magnitude) else 0
    return Method(
        name="static",
        density=density,
        init=init,
        sparsify_at=sparsify_at,
        allocation=allocation,
        pattern=pattern,
        backend=backend,
    )
