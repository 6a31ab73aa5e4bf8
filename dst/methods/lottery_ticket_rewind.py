"""Lottery tickets with rewinding."""

from __future__ import annotations

from dst import init as inits
from dst.allocation import Global
from dst.method import LotterySchedule, Method
from dst.types import Allocation, Duration


def lottery_ticket_rewind(
    density: float = 0.1,
    *,
    prune_fraction: float = 0.2,
    rewind_to: Duration = 0,
    allocation: Allocation | None = None,
    backend: str = "masked",
) -> Method:
    """Lottery tickets: iterative magnitude pruning with rewinding.

    Frankle & Carbin 2019 (https://arxiv.org/abs/1803.03635), with rewinding to an early step as in Frankle et al. 2020
    (https://arxiv.org/abs/1912.05671). Level 0 is dense; after every level 20% of the remaining weights go, by global
    magnitude, and training starts again from the snapshot of step k. The last level has exactly the density asked for.
    Each level is a fresh fit: use ``python train.py sparsity=lottery_ticket_rewind``, ``dst.lottery_run.run_lottery`` with
    a Lightning module, or the functions of ``dst.lottery`` in a loop of your own.

    Args:
        density: Density of the last level, in (0, 1].
        prune_fraction: Share of the remaining weights removed after each level.
        rewind_to: Step k of the dense level that later levels start from.
        allocation: How a level's budget is split; by default one global threshold.
        backend: Where weights live.
    """
    return Method(
        name="lottery_ticket_rewind",
        density=density,
        init=inits.Magnitude(),
        allocation=allocation if allocation is not None else Global(),
        lottery=LotterySchedule(prune_fraction, rewind_to),
        backend=backend,
    )
