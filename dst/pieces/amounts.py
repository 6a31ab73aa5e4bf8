"""How many connections an update drops, where the weights decide and not a fraction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dst.errors import ConfigurationError
from dst.pieces.protocols import LayerView


@dataclass(frozen=True)
class BelowZero:
    """Every active connection whose drop score is negative: those that crossed zero, in DeepR.

    Bellec et al. 2018, https://arxiv.org/abs/1711.05136, Algorithm 1.
    """

    @property
    def initial_state(self) -> float:
        """Not used."""
        return 0.0

    def counts(self, views: Sequence[LayerView], scores: Sequence[Tensor], state: float) -> tuple[list[int], float]:
        """Number of active connections with a negative score."""
        return [int((score[view.mask] < 0).sum()) for view, score in zip(views, scores, strict=True)], state


@dataclass(frozen=True)
class BelowThreshold:
    """Every active connection whose drop score is below one threshold for the network, which adapts.

    Dynamic sparse reparameterization (Mostafa & Wang 2019, https://arxiv.org/abs/1902.05967, Algorithm 1): when an update
    drops fewer than (1 - tolerance) · target connections the threshold doubles for the next one, when more than
    (1 + tolerance) · target it halves.

    Deviation: the target is a share of the active connections; the authors give a number for each network.

    Attributes:
        initial: Threshold of the first update, > 0.
        target: Share of the network's active connections that an update should drop, in (0, 1).
        tolerance: In [0, 1).
        most: The largest share of a layer's connections that one update may drop, so that no layer is cut, in (0, 1].
    """

    initial: float = 1e-3
    target: float = 0.05
    tolerance: float = 0.1
    most: float = 0.9

    def __post_init__(self) -> None:
        if self.initial <= 0 or not 0 < self.target < 1 or not 0 <= self.tolerance < 1 or not 0 < self.most <= 1:
            raise ConfigurationError(
                f"threshold {self.initial} must be positive, target {self.target} lie in (0, 1), tolerance "
                f"{self.tolerance} in [0, 1), most {self.most} in (0, 1]"
            )

    @property
    def initial_state(self) -> float:
        """The first threshold."""
        return self.initial

    def counts(self, views: Sequence[LayerView], scores: Sequence[Tensor], state: float) -> tuple[list[int], float]:
        """Number of active connections below the threshold ``state``, and the next threshold."""
        active = [int(view.mask.sum()) for view in views]
        below = [int((score[view.mask] < state).sum()) for view, score in zip(views, scores, strict=True)]
        aim = self.target * sum(active)
        if sum(below) < (1 - self.tolerance) * aim:
            state *= 2
        elif sum(below) > (1 + self.tolerance) * aim:
            state /= 2
        return [min(b, int(self.most * a)) for b, a in zip(below, active, strict=True)], state
