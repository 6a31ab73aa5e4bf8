"""How many weights an update drops and grows in each layer: integers with exact sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dst.pieces.protocols import LayerStat
from dst.topology.counts import apportion, drop_count


@dataclass(frozen=True)
class Change:
    """Numbers of weights that an update drops and grows in a layer.

    Attributes:
        drop: Weights to drop.
        grow: Weights to grow.
    """

    drop: int
    grow: int


def plan_change(
    active: int,
    budget: int,
    weights: int,
    *,
    fraction: float,
    grows: bool,
    surplus: float | None = None,
    amount: int | None = None,
) -> Change:
    """One layer's change: meet the budget, and replace a share of the active weights.

    Args:
        active: Active weights.
        budget: The layer's budget.
        weights: All weights of the layer.
        fraction: Share of the active weights to replace, in [0, 1].
        grows: Whether weights are ever grown; otherwise the layer only shrinks.
        surplus: Instead of replacing: share of the budget to hold beyond it until the next update.
        amount: Instead of ``fraction``: the number of weights to replace.

    Returns:
        A change with ``active - drop + grow`` equal to the budget plus the surplus. A layer that cannot grow keeps its
        count.
    """
    stays = min(active, budget)
    if not grows:
        return Change(active - stays, 0)
    if surplus is not None:
        replaced, extra = 0, math.floor(surplus * budget + 1e-9)
    else:
        replaced, extra = drop_count(stays, fraction) if amount is None else min(amount, stays), 0
    drop = active - stays + replaced
    return Change(drop, min(budget + extra, weights) - (active - drop))


def leave_none_empty(stats: Sequence[LayerStat], changes: Sequence[Change]) -> list[Change]:
    """Leave every layer at least one active weight, taken from the layer that grows most.

    Args:
        stats: The layers.
        changes: Their changes; the sum of ``kept + grow`` is at least the number of layers.

    Returns:
        Changes with the same sums of drops and growth, as far as growth suffices.
    """
    result = list(changes)
    for i, (stat, change) in enumerate(zip(stats, changes, strict=True)):
        if stat.kept + change.grow == 0:
            spare = [min(c.grow, s.kept + c.grow - 1) for s, c in zip(stats, result, strict=True)]
            most = max(range(len(spare)), key=spare.__getitem__)
            if spare[most] > 0:
                result[most] = replace(result[most], grow=result[most].grow - 1)
                result[i] = replace(change, grow=1)
    return result


def scaled(counts: Sequence[int], total: int, limits: Sequence[int]) -> list[int]:
    """Scale counts in proportion to another sum, each at least 1.

    Args:
        counts: Whole numbers >= 1.
        total: The sum, from the number of counts to the sum of the limits.
        limits: The most that each may be.
    """
    more = apportion(total - len(counts), [float(c - 1) for c in counts], [limit - 1 for limit in limits])
    return [1 + m for m in more]


def only_shrinking(active: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Counts with the same sum under which no layer grows, if the active weights suffice.

    Args:
        active: Active weights per layer.
        counts: The wanted counts.
    """
    result = [min(a, c) for a, c in zip(active, counts, strict=True)]
    room = [a - r for a, r in zip(active, result, strict=True)]
    missing = min(sum(counts) - sum(result), sum(room))
    return [r + m for r, m in zip(result, apportion(missing, [float(r) for r in room], room), strict=True)]
