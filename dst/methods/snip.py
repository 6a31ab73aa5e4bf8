"""Single-shot network pruning by connection sensitivity."""

from __future__ import annotations

from dst.method import Method
from dst.pieces import init as inits
from dst.pieces.allocation import Global
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Pattern


def snip(
    density: float = 0.1,
    *,
    allocation: Allocation | None = None,
    pattern: Pattern | None = None,
    backend: str = "masked",
) -> Method:
    """SNIP: a mask made at the first batch by connection sensitivity, and fixed.

    Lee, Ajanthan, Torr 2019 (https://arxiv.org/abs/1810.02340): keep the weights with the largest abs(g · w). The first
    step changes the mask and not the weights.

    Args:
        density: Target density, in (0, 1].
        allocation: How the budget is split; by default one global threshold.
        pattern: Which weights live and die together; every weight for itself by default.
        backend: Where weights live.
    """
    return Method(
        name="snip",
        density=density,
        init=inits.Snip(),
        allocation=allocation if allocation is not None else Global(),
        pattern=pattern if pattern is not None else Unstructured(),
        backend=backend,
    )
