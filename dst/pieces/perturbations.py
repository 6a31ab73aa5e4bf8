"""What is added to the gradients of active weights at every step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.pieces.protocols import LayerView


@dataclass(frozen=True)
class Langevin:
    """An L1 pull to zero and Gaussian noise: DeepR's random walk (Bellec et al. 2018, equation 5, arXiv:1711.05136).

    A step of plain SGD then moves the weight along its sign, θ, by ``-η · ∂L/∂θ - η · α + √(2 · η · T) · ν`` with ν
    standard normal. Signs are those that the drop score keeps (``scores.KeptSign``), the weights' own where it keeps none.

    Deviation: gradients are what is changed, so that any optimizer and clipping may follow. Momentum and Adam average and
    scale the pull and the noise like all of the gradient; only plain SGD makes the step above.

    Attributes:
        l1: α, >= 0.
        temperature: T, >= 0; 0 for no noise.
    """

    l1: float = 1e-5
    temperature: float = 0.0

    def __post_init__(self) -> None:
        for name in ("l1", "temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be a number that is not negative")

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
