"""How many connections an update drops and grows in every layer: whole numbers that add up."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dst.topology import drop_count


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
