"""Soft thresholds that are learned (STR)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dst.pieces.relaxations.relaxation import (
    LatentLayer,
    MaskFollowing,
    check_at_least_zero,
    where_active,
    wide_dtype,
)


@dataclass(frozen=True)
class LearnedThreshold(MaskFollowing):
    """STR: sign(w) · relu(abs(w) − g(s)), with one s per layer (Kusupati et al. 2020, https://arxiv.org/abs/2002.03231).

    g is the sigmoid. Plain gradient descent updates s, at the optimizer's learning rate. Weight decay pulls s to 0, and so
    the threshold to 0.5, which makes networks sparse.

    Attributes:
        initial: Initial s. The authors use -200 to -12800, searched for each density and length of training.
        decay: Weight decay of s, >= 0.
    """

    until_mask: ClassVar[bool] = True

    initial: float = -8.0
    decay: float = 1e-4

    def __post_init__(self) -> None:
        check_at_least_zero(self.decay, "decay of the threshold")

    def learned(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """``threshold``: s, a scalar, float32 or wider."""
        return {"threshold": torch.full((), self.initial, dtype=wide_dtype(weight), device=weight.device)}

    def effective(self, layer: LatentLayer, training: bool) -> Tensor:
        """sign(w) · relu(abs(w) − g(s))."""
        return layer.weight.sign() * self.importance(layer).relu()

    def importance(self, layer: LatentLayer) -> Tensor:
        """abs(w) − g(s): the effective magnitude if positive, minus the distance from the threshold otherwise."""
        return layer.weight.abs() - layer.learned["threshold"].sigmoid().to(layer.weight.dtype)

    def trained(self, layer: LatentLayer) -> Tensor | None:
        """Weights above the threshold."""
        return self.importance(layer) > 0

    def backward(self, layer: LatentLayer, gradient: Tensor, rate: float) -> Tensor:
        """The gradient above the threshold, zero below; s takes its step."""
        above = where_active(self.importance(layer) > 0, gradient)
        threshold = layer.learned["threshold"]
        slope = threshold.sigmoid() * (1 - threshold.sigmoid())
        step = -slope * (above * layer.weight.sign()).sum(dtype=threshold.dtype) + self.decay * threshold
        threshold.sub_(rate * step)
        return above

    def expected(self, layer: LatentLayer) -> float:
        """Number of weights above the threshold."""
        return float((self.importance(layer) > 0).sum())

    def shift(self, layer: LatentLayer, pressure: float) -> None:
        """Add to s: a small threshold g(s) is about exp(s), so the scale is logarithmic."""
        layer.learned["threshold"].add_(pressure)
