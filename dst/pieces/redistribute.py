"""Moving budget between layers at topology updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dst.pieces.protocols import LayerStat, LayerView


@dataclass(frozen=True)
class MeanMomentum:
    """Connections grow where the mean momentum of the active weights is largest.

    Sparse momentum (Dettmers & Zettlemoyer 2019, https://arxiv.org/abs/1907.04840, section 3.2): a layer's share of what
    all layers dropped is the mean of abs(momentum) over its active weights, relative to the sum of these means.
    Momentum is the grow score's own mean of dense gradients (``scores.Momentum``).

    Deviation: shares are rounded by largest remainders, so that the network's count is exact, and what a full layer
    cannot take goes to the others in proportion; the authors round up and redistribute in several rounds.
    """

    @property
    def needs_gradient(self) -> bool:
        """Always: the mean of the gradients."""
        return True

    def measure(self, view: LayerView) -> float:
        """Mean of abs(momentum) over the active weights."""
        mean = view.buffer if view.buffer is not None else view.gradient
        if mean is None or not bool(view.mask.any()):
            return 0.0
        return float(mean.abs()[view.mask].mean())

    def grow_counts(self, stats: Sequence[LayerStat], total: int) -> list[int]:
        """Split ``total`` by strength."""
        return apportion(total, [s.strength for s in stats], [s.weights - s.kept for s in stats])


@dataclass(frozen=True)
class Survivors:
    """Connections grow in proportion to what a layer has left after the drop.

    Dynamic sparse reparameterization (Mostafa & Wang 2019, https://arxiv.org/abs/1902.05967, Algorithm 1): layers that
    lose few weights to the common threshold have a larger mean gradient, and get more.
    """

    @property
    def needs_gradient(self) -> bool:
        """Never."""
        return False

    def measure(self, view: LayerView) -> float:
        """Not used."""
        return 0.0

    def grow_counts(self, stats: Sequence[LayerStat], total: int) -> list[int]:
        """Split ``total`` by the number of connections that are kept."""
        return apportion(total, [float(s.kept) for s in stats], [s.weights - s.kept for s in stats])


def apportion(total: int, shares: Sequence[float], limits: Sequence[int]) -> list[int]:
    """Split a whole number in proportion to shares, by largest remainders, within limits.

    Args:
        total: What to split, >= 0; at most the sum of ``limits``.
        shares: Finite claims, >= 0. Where those of all that have room are zero, the limits count instead.
        limits: The most that each may get.

    Returns:
        One whole number per share, which add up to ``total``.

    Raises:
        ValueError: ``total`` exceeds the sum of the limits.
    """
    if total > sum(limits):
        raise ValueError(f"cannot place {total} within limits that add up to {sum(limits)}")
    counts = [0] * len(shares)
    while (left := total - sum(counts)) > 0:
        room = [i for i, limit in enumerate(limits) if counts[i] < limit]
        claims = {i: shares[i] for i in room if shares[i] > 0 and math.isfinite(shares[i])}
        if not claims:
            claims = {i: float(limits[i] - counts[i]) for i in room}
        scale = left / sum(claims.values())
        ideal = {i: min(claim * scale, limits[i] - counts[i]) for i, claim in claims.items()}
        given = {i: math.floor(x) for i, x in ideal.items()}
        if any(ideal[i] < claims[i] * scale for i in claims):
            # Some are full: give the whole parts, and split what is left among the others in the next round.
            if not any(given.values()):
                given = dict.fromkeys([max(ideal, key=lambda i: ideal[i])], 1)
        else:
            rest = left - sum(given.values())
            for i in sorted(claims, key=lambda i: given[i] - ideal[i])[:rest]:
                given[i] += 1
        for i, number in given.items():
            counts[i] += min(number, limits[i] - counts[i])
    return counts
