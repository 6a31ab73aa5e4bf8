"""Stochastic gates (L0 regularisation)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.pieces.relaxations.adam import Adam
from dst.pieces.relaxations.relaxation import (
    LatentLayer,
    MaskFollowing,
    check_at_least_zero,
    where_active,
    wide_dtype,
)


@dataclass(frozen=True)
class HardConcrete(Adam, MaskFollowing):
    """L0 regularisation by stochastic gates (Louizos et al. 2018, https://arxiv.org/abs/1712.01312).

    Each weight has a gate z. In training z = min(1, max(0, s·(ζ − γ) + γ)) with s = sigmoid((logit(u) + log α) / β) and u
    uniform (equations 10 and 11). In evaluation s = sigmoid(log α) (equation 13). The penalty is λ times
    sigmoid(log α − β·log(−γ/ζ)), the probability that z is not zero (equation 12). Adam updates log α, as in the authors'
    code.

    Attributes:
        learning_rate: Learning rate of log α, > 0.
        penalty: λ, times the expected density of each layer, >= 0: the authors' λ times the number of weights.
        beta: β, temperature, > 0.
        gamma: γ, lower end of the stretched interval, < 0.
        zeta: ζ, upper end of the stretched interval, > 1.
        initial: Mean of the initial log α, which is normal with standard deviation 0.01.
    """

    until_mask: ClassVar[bool] = True
    samples: ClassVar[bool] = True

    penalty: float = 0.0
    beta: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1
    initial: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_zero(self.penalty, "penalty")
        if not (self.beta > 0 and self.gamma < 0 and self.zeta > 1):
            raise ConfigurationError(
                f"beta={self.beta}, gamma={self.gamma}, zeta={self.zeta}: gates need beta > 0, gamma < 0 and zeta > 1"
            )

    def learned(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """``gate``: log α, float32 or wider; and Adam's state."""
        spread = 0.01 * torch.randn(weight.shape, generator=generator)
        gate = torch.empty_like(weight, dtype=wide_dtype(weight)).copy_(self.initial + spread)
        return {"gate": gate, **self.moments(gate)}

    def _stretched(self, layer: LatentLayer, training: bool) -> tuple[Tensor, Tensor]:
        """s, and s stretched to [γ, ζ]."""
        gate = layer.learned["gate"]
        if training:
            assert layer.noise is not None
            s = ((layer.noise + gate) / self.beta).sigmoid()
        else:
            s = gate.sigmoid()
        return s, s * (self.zeta - self.gamma) + self.gamma

    def effective(self, layer: LatentLayer, training: bool) -> Tensor:
        """Weight · z."""
        stretched = self._stretched(layer, training)[1]
        return where_active(stretched > 0, layer.weight * stretched.clamp(0, 1).to(layer.weight.dtype))

    def importance(self, layer: LatentLayer) -> Tensor:
        """Log α."""
        return layer.learned["gate"]

    def trained(self, layer: LatentLayer) -> Tensor | None:
        """Weights whose gate is open in this step."""
        return self._stretched(layer, True)[1] > 0

    def backward(self, layer: LatentLayer, gradient: Tensor, rate: float) -> Tensor:
        """The gradient times z; log α takes its step, by g · w · dz/dlog α and the penalty."""
        gate = layer.learned["gate"]
        s, stretched = self._stretched(layer, True)
        inside = (stretched > 0) & (stretched < 1)
        slope = where_active(inside, s * (1 - s) * ((self.zeta - self.gamma) / self.beta))
        toward = gradient.to(gate.dtype) * layer.weight * slope
        if self.penalty:
            open_ = self._probability(gate)
            toward = toward + self.penalty / gate.numel() * open_ * (1 - open_)
        self.move(gate, toward, layer.learned)
        return where_active(stretched > 0, gradient * stretched.clamp(0, 1).to(gradient.dtype))

    def _probability(self, gate: Tensor) -> Tensor:
        """The probability that a sampled gate is not zero."""
        return (gate - self.beta * math.log(-self.gamma / self.zeta)).sigmoid()

    def expected(self, layer: LatentLayer) -> float:
        """Sum of the probabilities that gates are open."""
        return float(self._probability(layer.learned["gate"]).sum())

    def shift(self, layer: LatentLayer, pressure: float) -> None:
        """Subtract from log α."""
        layer.learned["gate"].sub_(pressure)
