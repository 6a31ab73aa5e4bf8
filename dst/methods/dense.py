"""No sparsity."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import documented


@documented
def dense(density: float = 1.0, *, backend: str = "masked") -> Method:
    """No sparsity: the baseline, under the same measurements as every other method.

    Args:
        density: Ignored: the network keeps all its weights. Accepted so that sweeps can pass it to every method.
    """
    return Method(name="dense", density=1.0, backend=backend)
