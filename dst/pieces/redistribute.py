"""Moving budget between layers at topology updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dst.pieces.protocols import LayerStat, LayerView
from dst.topology.counts import apportion


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
