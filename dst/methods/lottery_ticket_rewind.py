"""Lottery tickets with rewinding."""

from __future__ import annotations

from dst.method import LotterySchedule, Method
from dst.pieces import init as inits
from dst.pieces.allocation import Global
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Pattern


def lottery_ticket_rewind(
    density: float = 0.1,
    *,
    prune_fraction: float | None = 0.2,
    rewind_to: Duration = 0,
    rewind: str = "weights",
    allocation: Allocation | None = None,
    pattern: Pattern | None = None,
    backend: str = "masked",
) -> Method:
    """Lottery tickets: iterative magnitude pruning with rewinding.

    Frankle & Carbin 2019 (https://arxiv.org/abs/1803.03635), with rewinding to an early step as in Frankle et al. 2020
    (https://arxiv.org/abs/1912.05671), or of the learning rate alone, or none as in Renda et al. 2020
    (https://arxiv.org/abs/2003.02389). Level 0 is dense; after every level 20% of the remaining weights go, by global
    magnitude, and training starts again from the snapshot of step k. The last level has exactly the density asked for.
    Each level is a fresh fit: use ``python train.py sparsity=lottery_ticket_rewind``, ``dst.lightning.lottery_levels.run_lottery`` with
    a Lightning module, or the functions of ``dst.lottery`` in a loop of your own.

    Args:
        density: Density of the last level, in (0, 1].
        prune_fraction: Share of the remaining weights removed after each level; ``None`` prunes once, straight to the
            density.
        rewind_to: Step k of the dense level that later levels start from.
        rewind: What goes back to it: ``"weights"`` (all), ``"learning_rate"`` (its schedule, with the weights as trained)
            or ``"none"`` (fine-tuning at the last learning rate).
        allocation: How a level's budget is split; by default one global threshold.
        pattern: Every weight for itself; levels prune single weights, so others are refused.
        backend: Where weights live.
    """
    return Method(
        name="lottery_ticket_rewind",
        density=density,
        init=inits.Magnitude(),
        allocation=allocation if allocation is not None else Global(),
        lottery=LotterySchedule(prune_fraction, rewind_to, rewind),
        pattern=pattern if pattern is not None else Unstructured(),
        backend=backend,
    )
