"""Lottery tickets with rewinding."""

from __future__ import annotations

from dst.method import LotterySchedule, Method
from dst.methods.shared import documented
from dst.pieces import init as inits
from dst.pieces.allocation import Global
from dst.pieces.durations import Duration
from dst.pieces.patterns import Unstructured
from dst.pieces.protocols import Allocation, Pattern


@documented
def lottery_ticket_rewind(
    density: float = 0.1,
    *,
    prune_fraction: float | None = 0.2,
    rewind_to: Duration = 0,
    rewind: str = "weights",
    allocation: Allocation = Global(),
    pattern: Pattern = Unstructured(),
    backend: str = "masked",
) -> Method:
    """Lottery tickets: iterative magnitude pruning with rewinding.

    Frankle & Carbin 2019 (https://arxiv.org/abs/1803.03635), with rewinding to an early step as in Frankle et al. 2020
    (https://arxiv.org/abs/1912.05671), or with learning-rate rewinding or fine-tuning as in Renda et al. 2020
    (https://arxiv.org/abs/2003.02389). Level 0 is dense. After every level 20% of the remaining weights are pruned by
    global magnitude, and training restarts from the snapshot of step k. The last level has exactly the target density.
    Each level is a separate fit: use ``python train.py sparsity=lottery_ticket_rewind``,
    ``dst.lightning.lottery_levels.run_lottery`` with a Lightning module, or the functions of ``dst.engine.lottery`` in a
    custom loop.

    Args:
        density: Density of the last level, in (0, 1].
        prune_fraction: Share of the remaining weights pruned after each level; ``None`` prunes once, straight to the
            target density.
        rewind_to: Step k of the dense level, at which later levels start.
        rewind: What is reset to step k: ``"weights"`` (everything), ``"learning_rate"`` (the learning-rate schedule
            only, with the trained weights) or ``"none"`` (fine-tuning at the last learning rate).
        allocation: How a level's budget is split over layers.
        pattern: Unstructured; levels prune single weights, so other patterns are refused.
    """
    return Method(
        name="lottery_ticket_rewind",
        density=density,
        init=inits.Magnitude(),
        allocation=allocation,
        lottery=LotterySchedule(prune_fraction, rewind_to, rewind),
        pattern=pattern,
        backend=backend,
    )
