"""Perturbations: additions to the gradients of active weights at every step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.pieces.protocols import LayerView


@dataclass(frozen=True)
class Langevin:
    """L1 penalty and Gaussian noise: DeepR's random walk (Bellec et al. 2018, equation 5, arXiv:1711.05136).

    A step of plain SGD changes θ = sign · w by ``-η · ∂L/∂θ - η · α + √(2 · η · T) · ν`` with ν standard normal. The signs
    are those of the drop score (``scores.KeptSign``), or the weights' own if it keeps none.

    Deviation: penalty and noise are added to the gradients, before clipping and any optimizer. Momentum and Adam average and
    scale them with the rest of the gradient; only plain SGD takes the step above.

    Attributes:
        l1: α, strength of the penalty, >= 0.
        temperature: T, temperature of the noise, >= 0; 0 for no noise.
    """

    l1: float = 1e-5
    temperature: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("l1", self.l1), ("temperature", self.temperature)):
            if not 0 <= value < math.inf:
                raise ConfigurationError(f"{name}={value} must be finite and at least 0")

    def __call__(self, view: LayerView, lr: float) -> Tensor:
        """``α · sign - √(2T / η) · ν`` where active, 0 elsewhere; float32 or wider, of the layer's shape."""
        dtype = torch.promote_types(view.weight.dtype, torch.float32)
        signs = view.weight.sign() if view.buffer is None else view.buffer
        added = self.l1 * signs.to(dtype)
        if self.temperature and lr > 0:
            active = view.mask.reshape(-1).nonzero().squeeze(1)
            noise = torch.randn(active.numel(), generator=view.generator).to(active.device, dtype)
            flat = added.reshape(-1)
            flat[active] -= math.sqrt(2 * self.temperature / lr) * noise
            added = flat.view(added.shape)
        return added.masked_fill(~view.mask, 0)
