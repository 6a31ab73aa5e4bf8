"""A random mask, fixed from step 0."""

from __future__ import annotations

from dst.method import Method
from dst.pieces.allocation import ERK
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Pattern


def sparse_from_scratch(
    density: float = 0.1,
    *,
    allocation: Allocation | None = None,
    rescale_init: bool = True,
    pattern: Pattern | None = None,
    backend: str = "masked",
) -> Method:
    """A random mask, fixed from step 0, with a sparse-aware initialisation.

    The baseline that every dynamic method has to beat ("Static" in Evci et al. 2020; Liu et al. 2022,
    https://arxiv.org/abs/2202.02643).

    Args:
        density: Target density, in (0, 1].
        allocation: How the budget is split; ERK by default.
        rescale_init: Scale initial weights to the active fan-in (Evci et al. 2022, https://arxiv.org/abs/2010.03533).
        pattern: Which weights live and die together; every weight for itself by default.
        backend: Where weights live.
    """
    return Method(
        name="sparse_from_scratch",
        density=density,
        allocation=allocation if allocation is not None else ERK(),
        rescale_init=rescale_init,
        pattern=pattern if pattern is not None else Unstructured(),
        backend=backend,
    )
