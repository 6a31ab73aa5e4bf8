"""How many connections an update drops and grows in every layer: whole numbers that add up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dst.pieces.protocols import LayerStat
from dst.topology.counts import apportion, drop_count


@dataclass(frozen=True)
class Change:
    """What an update does to a layer's number of connections.

    Attributes:
        drop: Connections to drop.
        grow: Connections to grow then.
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
    """One layer's change: down or up to its budget, with a share of it replaced.

    Args:
        active: Connections that the layer has.
        budget: Connections that it is to have.
        weights: Positions in it.
        fraction: Share of the remaining connections to replace, in [0, 1].
        grows: Whether connections ever grow; otherwise the layer only shrinks.
        surplus: Instead of replacing: share of the budget to hold on top of it until the next update.
        amount: Instead of ``fraction``: the number of connections to replace.

    Returns:
        Numbers with ``active - drop + grow`` equal to the budget, and the surplus on top; a layer that cannot grow
        stays where it is.
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
    """Let every layer end with a connection at least, at the cost of the one that grows most.

    Args:
        stats: The layers.
        changes: What happens to them; ``kept + grow`` of all layers together is at least their number.

    Returns:
        Changes with the same sums of drops and of growth, wherever growth suffices for it.
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
    """Bring counts to another sum in proportion to what they are, each at least 1.

    Args:
        counts: Whole numbers >= 1.
        total: The sum wanted, from their number to the sum of the limits.
        limits: The most that each may be.
    """
    more = apportion(total - len(counts), [float(c - 1) for c in counts], [limit - 1 for limit in limits])
    return [1 + m for m in more]


def only_shrinking(active: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Counts of the same sum that no layer has to grow for, where what is active suffices.

    Args:
        active: What the layers have.
        counts: What they would get.
    """
    result = [min(a, c) for a, c in zip(active, counts, strict=True)]
    room = [a - r for a, r in zip(active, result, strict=True)]
    missing = min(sum(counts) - sum(result), sum(room))
    return [r + m for r, m in zip(result, apportion(missing, [float(r) for r in room], room), strict=True)]
