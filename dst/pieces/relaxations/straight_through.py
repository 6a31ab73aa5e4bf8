"""Straight-through estimator: the optimizer also moves weights that the mask hides (Top-KAST, SR-STE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.pieces.relaxations.relaxation import LatentLayer, MaskFollowing, check_at_least_zero, where_active
from dst.topology.counts import count_active
from dst.topology.selection import select_top


@dataclass(frozen=True)
class StraightThrough(MaskFollowing):
    """Straight-through estimator: the gradient of weight ⊙ mask serves as the gradient of the weight.

    Inactive latent weights keep their values and are trained too. Top-KAST (Jayakumar et al. 2021,
    https://arxiv.org/abs/2106.03517) trains only the weights of largest magnitude, at a density above the mask's, and decays
    active and inactive ones at different rates. SR-STE (Zhou et al. 2021, https://arxiv.org/abs/2102.04010, equation 9)
    trains all weights and decays the inactive ones: g + λ·(1 − m) ⊙ w.

    Attributes:
        backward_density: Density, over all sparse layers, of the trained weights, in (0, 1] and at least the method's. The
            ratio of trained to active weights is the same in every layer. ``None`` trains all.
        active_decay: Weight decay of active weights, >= 0: this times the weight is added to the gradient.
        inactive_decay: Weight decay of inactive weights that are trained, >= 0.
    """

    until_mask: ClassVar[bool] = False

    backward_density: float | None = None
    active_decay: float = 0.0
    inactive_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.backward_density is not None and not 0 < self.backward_density <= 1:
            raise ConfigurationError(f"backward_density={self.backward_density} must lie in (0, 1]")
        check_at_least_zero(self.active_decay, "active_decay")
        check_at_least_zero(self.inactive_decay, "inactive_decay")

    def learned(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """``moved``: bool, True where weights are trained; nothing if all are."""
        return {} if self.backward_density is None else {"moved": torch.ones_like(weight, dtype=torch.bool)}

    def effective(self, layer: LatentLayer, training: bool) -> Tensor:
        """Weight ⊙ mask."""
        return where_active(layer.mask, layer.weight)

    def importance(self, layer: LatentLayer) -> Tensor:
        """abs(weight)."""
        return layer.weight.abs()

    def trained(self, layer: LatentLayer) -> Tensor | None:
        """The trained weights."""
        return layer.learned.get("moved")

    def frozen(self, layer: LatentLayer) -> Tensor | None:
        """All other weights: neither momentum nor the optimizer's weight decay moves them."""
        return None if self.backward_density is None else ~layer.learned["moved"]

    def backward(self, layer: LatentLayer, gradient: Tensor, rate: float) -> Tensor:
        """The gradient plus the decay, where weights are trained."""
        if not self.active_decay and not self.inactive_decay:
            return gradient
        decay = torch.where(layer.mask, self.active_decay, self.inactive_decay).to(gradient.dtype)
        result = gradient + decay * layer.weight
        return result if self.backward_density is None else where_active(layer.learned["moved"], result)

    def select(self, layer: LatentLayer, density: float, generator: torch.Generator) -> None:
        """Train the active weights and the largest inactive ones."""
        if self.backward_density is None:
            return
        active, size = int(layer.mask.sum()), layer.mask.numel()
        wanted = count_active(size, min(1.0, active / size * self.backward_density / density))
        others = select_top(layer.weight.abs(), max(0, wanted - active), ~layer.mask, generator)
        layer.learned["moved"].copy_(layer.mask | others)
