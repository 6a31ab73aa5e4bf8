"""Single-shot network pruning by connection sensitivity."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import documented
from dst.pieces import init as inits
from dst.pieces.allocation import Global
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Pattern


@documented
def snip(
    density: float = 0.1,
    *,
    allocation: Allocation = Global(),
    pattern: Pattern = Unstructured(),
    backend: str = "masked",
) -> Method:
    """SNIP: a fixed mask, made at the first batch by connection sensitivity.

    Lee, Ajanthan, Torr 2019 (https://arxiv.org/abs/1810.02340): keep the weights with the largest abs(g · w). The first
    step makes the mask and does not change the weights.
    """
    return Method(
        name="snip",
        density=density,
        init=inits.Snip(),
        allocation=allocation,
        pattern=pattern,
        backend=backend,
    )
