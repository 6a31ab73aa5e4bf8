"""The protocol of relaxations, one layer of latent weights, and what relaxations share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from dst.errors import ConfigurationError


@dataclass(frozen=True)
class LatentLayer:
    """One layer of latent weights.

    The tensors are views, which a relaxation may change in place. All but scalars have the layer's shape.

    Attributes:
        weight: Latent weights.
        mask: Bool, the engine's mask; all True before the first one.
        learned: Other tensors of the relaxation by name, as its ``learned`` returned them.
        noise: Logits of uniform random numbers, for relaxations that sample; constant within an optimizer step.
    """

    weight: Tensor
    mask: Tensor
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    noise: Tensor | None = None


class Relaxation(Protocol):
    """Computes effective weights from latent weights."""

    @property
    def until_mask(self) -> bool:
        """Whether the relaxation learns which weights are active, and ends when the first mask is made."""

    @property
    def samples(self) -> bool:
        """Whether effective weights are random in training, and deterministic in evaluation."""

    def learned(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the initial values of tensors to keep beside a layer's latent weights, by name."""

    def effective(self, layer: LatentLayer, training: bool) -> Tensor:
        """Return the weights of the forward pass, of the layer's shape."""

    def importance(self, layer: LatentLayer) -> Tensor:
        """Return the scores that rank the weights for a mask, of the layer's shape; higher is better."""

    def trained(self, layer: LatentLayer) -> Tensor | None:
        """Return where ``backward`` reads the gradient of the effective weights (bool); ``None`` for everywhere."""

    def frozen(self, layer: LatentLayer) -> Tensor | None:
        """Return where latent weights keep their values, whatever the optimizer does (bool); ``None`` for nowhere."""

    def backward(self, layer: LatentLayer, gradient: Tensor, rate: float) -> Tensor:
        """Return the gradient of the latent weights, and update what is learned beside them.

        Args:
            layer: The layer.
            gradient: Gradient of the effective weights, of the layer's shape.
            rate: The optimizer's learning rate.
        """

    def select(self, layer: LatentLayer, density: float, generator: torch.Generator) -> None:
        """Adapt to a new mask of the engine.

        Args:
            layer: The layer, with the new mask.
            density: The method's density, in (0, 1].
            generator: CPU generator that breaks ties.
        """

    def expected(self, layer: LatentLayer) -> float:
        """Return the (expected) number of active weights."""

    def shift(self, layer: LatentLayer, pressure: float) -> None:
        """Make fewer weights active (``pressure`` > 0) or more (< 0), where that is learned."""


class MaskFollowing:
    """Defaults: the engine's mask says which weights are active, all weights are trained, and nothing is sampled."""

    samples: ClassVar[bool] = False

    def learned(self, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def trained(self, layer: LatentLayer) -> Tensor | None:
        """``None``: everywhere."""
        return None

    def frozen(self, layer: LatentLayer) -> Tensor | None:
        """``None``: nowhere."""
        return None

    def select(self, layer: LatentLayer, density: float, generator: torch.Generator) -> None:
        """Nothing to adapt."""

    def expected(self, layer: LatentLayer) -> float:
        """Number of active weights of the mask."""
        return float(layer.mask.sum())

    def shift(self, layer: LatentLayer, pressure: float) -> None:
        """Nothing to shift."""


def where_active(active: Tensor, values: Tensor) -> Tensor:
    """Return the values where True and exact zeros elsewhere, even in the place of NaN."""
    return torch.where(active, values, torch.zeros((), dtype=values.dtype, device=values.device))


def wide_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of what is learned beside weights: float32, or the weights' where wider."""
    return torch.promote_types(weight.dtype, torch.float32)


def check_at_least_zero(value: float, name: str) -> None:
    """Raise ``ConfigurationError`` unless ``value`` is finite and at least 0."""
    if not 0 <= value < math.inf:
        raise ConfigurationError(f"{name}={value} must be at least 0")
