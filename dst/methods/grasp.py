"""Gradient signal preservation."""

from __future__ import annotations

from dst.method import Method
from dst.pieces import init as inits
from dst.pieces.allocation import Global
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Pattern


def grasp(
    density: float = 0.1,
    *,
    temperature: float = 200.0,
    allocation: Allocation | None = None,
    pattern: Pattern | None = None,
    backend: str = "masked",
) -> Method:
    """GraSP: a mask made at the first batch so that the gradient stays large, and fixed.

    Wang, Zhang, Grosse 2020 (https://arxiv.org/abs/2002.07376): keep the weights with the largest w · (H g), whose removal
    would lower the gradient's norm most. A loop of your own calls ``sparsifier.before_backward(loss)`` before
    ``loss.backward()``. The first step changes the mask and not the weights.

    Args:
        density: Target density, in (0, 1].
        temperature: What the model's outputs are divided by in the first step; 1 where they are no logits.
        allocation: How the budget is split; by default one global threshold.
        pattern: Which weights live and die together; every weight for itself by default.
        backend: Where weights live.
    """
    return Method(
        name="grasp",
        density=density,
        init=inits.Grasp(temperature),
        allocation=allocation if allocation is not None else Global(),
        pattern=pattern if pattern is not None else Unstructured(),
        backend=backend,
    )
