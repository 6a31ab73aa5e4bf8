"""No sparsity."""

from __future__ import annotations

from dst.method import Method


def dense(density: float = 1.0, *, backend: str = "masked") -> Method:
    """No sparsity: the baseline, under the same measurements as every other method.

    Args:
        density: Accepted so that sweeps can pass one to every method; the network keeps all its weights.
        backend: Where weights live.
    """
    return Method(name="dense", density=1.0, backend=backend)
