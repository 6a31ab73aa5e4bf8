"""A random mask, fixed from step 0."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import documented
from dst.pieces.allocation import ERK
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Pattern


@documented
def sparse_from_scratch(
    density: float = 0.1,
    *,
    allocation: Allocation = ERK(),
    rescale_init: bool = True,
    pattern: Pattern = Unstructured(),
    backend: str = "masked",
) -> Method:
    """A random mask, fixed from step 0, with a sparse-aware initialisation.

    The baseline that every dynamic method has to beat ("Static" in Evci et al. 2020; Liu et al. 2022,
    https://arxiv.org/abs/2202.02643).

    Args:
        rescale_init: Whether to scale initial weights to the active fan-in (Evci et al. 2022,
            https://arxiv.org/abs/2010.03533).
    """
    return Method(
        name="sparse_from_scratch",
        density=density,
        allocation=allocation,
        rescale_init=rescale_init,
        pattern=pattern,
        backend=backend,
    )
