"""Iterative synaptic flow pruning."""

from __future__ import annotations

from dst.method import Method
from dst.pieces import init as inits
from dst.pieces.allocation import Global
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Pattern


def synflow(
    density: float = 0.1,
    *,
    iterations: int = 100,
    allocation: Allocation | None = None,
    pattern: Pattern | None = None,
    backend: str = "masked",
) -> Method:
    """SynFlow: a mask made without data in many small steps, and fixed.

    Tanaka, Kunin, Yamins, Ganguli 2020 (https://arxiv.org/abs/2006.05467): keep the weights through which most flows from
    an input of ones to the outputs, with all parameters at their absolute values. The first training step tells how the
    model is called, and changes the mask and not the weights.

    Args:
        density: Target density, in (0, 1].
        iterations: Pruning steps on the way to it.
        allocation: How the budget is split; by default one global threshold.
        pattern: Which weights live and die together; every weight for itself by default.
        backend: Where weights live.
    """
    return Method(
        name="synflow",
        density=density,
        init=inits.Synflow(iterations),
        allocation=allocation if allocation is not None else Global(),
        pattern=pattern if pattern is not None else Unstructured(),
        backend=backend,
    )
