"""Iterative synaptic flow pruning."""

from __future__ import annotations

from dst.method import Method
from dst.methods.shared import documented
from dst.pieces import init as inits
from dst.pieces.allocation import Global
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Pattern


@documented
def synflow(
    density: float = 0.1,
    *,
    iterations: int = 100,
    allocation: Allocation = Global(),
    pattern: Pattern = Unstructured(),
    backend: str = "masked",
) -> Method:
    """SynFlow: a fixed mask, made without data in many small pruning steps.

    Tanaka, Kunin, Yamins, Ganguli 2020 (https://arxiv.org/abs/2006.05467): keep the weights with the largest flow from
    an input of ones to the outputs, with all parameters at their absolute values. The first training step records how
    the model is called; it makes the mask and does not change the weights.

    Args:
        iterations: Number of pruning steps.
    """
    return Method(
        name="synflow",
        density=density,
        init=inits.Synflow(iterations),
        allocation=allocation,
        pattern=pattern,
        backend=backend,
    )
