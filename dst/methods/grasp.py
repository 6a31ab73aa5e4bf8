"""Gradient signal preservation."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import documented
from dst.pieces import init as inits
from dst.pieces.allocation import Global
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Pattern


@documented
def grasp(
    density: float = 0.1,
    *,
    temperature: float = 200.0,
    allocation: Allocation = Global(),
    pattern: Pattern = Unstructured(),
    backend: str = "masked",
) -> Method:
    """GraSP: a fixed mask, made at the first batch, that keeps the gradient large.

    Wang, Zhang, Grosse 2020 (https://arxiv.org/abs/2002.07376): keep the weights with the largest w · (H g), whose
    removal would reduce the gradient's norm most. A custom training loop calls ``sparsifier.before_backward(loss)``
    before ``loss.backward()``. The first step makes the mask and does not change the weights.

    Args:
        temperature: Divides the model's outputs in the first step; use 1 for outputs other than logits.
    """
    return Method(
        name="grasp",
        density=density,
        init=inits.Grasp(temperature),
        allocation=allocation,
        pattern=pattern,
        backend=backend,
    )
