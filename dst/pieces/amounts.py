"""Amounts: how many weights an update drops, decided from the weights instead of a fraction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dst.errors import ConfigurationError
from dst.pieces.protocols import LayerView


@dataclass(frozen=True)
class BelowZero:
    """Drops all active weights with a negative drop score: in DeepR, those that crossed zero.

    Bellec et al. 2018, https://arxiv.org/abs/1711.05136, Algorithm 1.
    """

    initial_state: ClassVar[float] = 0.0

    def counts(self, views: Sequence[LayerView], scores: Sequence[Tensor], state: float) -> tuple[list[int], float]:
        """Number of active weights with a negative score, per layer; the state does not change."""
        return [int((score[view.mask] < 0).sum()) for view, score in zip(views, scores, strict=True)], state


@dataclass(frozen=True)
class BelowThreshold:
    """Drops all active weights whose drop score is below an adaptive threshold, which is the same in all layers.

    Dynamic sparse reparameterization (Mostafa & Wang 2019, https://arxiv.org/abs/1902.05967, Algorithm 1). The threshold
    doubles for the next update if fewer than (1 - tolerance) · target weights are below it, and halves if more than
    (1 + tolerance) · target are.

    Deviation: the target is a share of the active weights; the authors use a number for each network.

    Attributes:
        initial: Threshold of the first update, > 0.
        target: Share of the network's active weights that an update should drop, in (0, 1).
        tolerance: Relative distance from the target at which the threshold stays, in [0, 1).
        most: Largest share of a layer's active weights that one update drops, in (0, 1].
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
        """``initial``."""
        return self.initial

    def counts(self, views: Sequence[LayerView], scores: Sequence[Tensor], state: float) -> tuple[list[int], float]:
        """Number of active weights below the threshold ``state``, per layer, and the next threshold."""
        active = [int(view.mask.sum()) for view in views]
        below = [int((score[view.mask] < state).sum()) for view, score in zip(views, scores, strict=True)]
        aim = self.target * sum(active)
        if sum(below) < (1 - self.tolerance) * aim:
            state *= 2
        elif sum(below) > (1 + self.tolerance) * aim:
            state /= 2
        return [min(b, int(self.most * a)) for b, a in zip(below, active, strict=True)], state
