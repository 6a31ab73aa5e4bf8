"""Moving budget between layers at topology updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dst.pieces.protocols import LayerStat, LayerView
from dst.topology.counts import apportion


@dataclass(frozen=True)
class MeanMomentum:
    """Grows weights in proportion to the mean momentum of the active weights.

    Sparse momentum (Dettmers & Zettlemoyer 2019, https://arxiv.org/abs/1907.04840, section 3.2): a layer's share of all
    dropped weights is the mean of abs(momentum) over its active weights, divided by the sum of these means. Momentum is the
    grow score's average of dense gradients (``scores.Momentum``).

    Deviation: shares are rounded by largest remainders, so the network's count is exact. What a full layer cannot take goes
    to the others in proportion. The authors round up and redistribute in several rounds.
    """

    needs_gradient: ClassVar[bool] = True

    def measure(self, view: LayerView) -> float:
        """Mean of abs(momentum) over the active weights, >= 0."""
        mean = view.buffer if view.buffer is not None else view.gradient
        if mean is None or not bool(view.mask.any()):
            return 0.0
        return float(mean.abs()[view.mask].mean())

    def grow_counts(self, stats: Sequence[LayerStat], total: int) -> list[int]:
        """Split ``total`` in proportion to strength."""
        return apportion(total, [s.strength for s in stats], [s.weights - s.kept for s in stats])


@dataclass(frozen=True)
class Survivors:
    """Grows weights in proportion to the active weights of each layer after the drop.

    Dynamic sparse reparameterization (Mostafa & Wang 2019, https://arxiv.org/abs/1902.05967, Algorithm 1). Layers that lose
    few weights to the common threshold have a larger mean gradient and get more.
    """

    needs_gradient: ClassVar[bool] = False

    def measure(self, view: LayerView) -> float:
        """Not used."""
        return 0.0

    def grow_counts(self, stats: Sequence[LayerStat], total: int) -> list[int]:
        """Split ``total`` in proportion to the number of kept weights."""
        return apportion(total, [float(s.kept) for s in stats], [s.weights - s.kept for s in stats])
