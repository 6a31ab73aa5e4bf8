"""Adam for tensors that a relaxation learns beside the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dst.errors import ConfigurationError


@dataclass(frozen=True)
class Adam:
    """Steps of Adam (Kingma & Ba 2015, https://arxiv.org/abs/1412.6980), with the paper's β₁, β₂ and ε.

    Attributes:
        learning_rate: Constant learning rate, > 0.
    """

    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ConfigurationError(f"learning_rate={self.learning_rate} must be positive")

    @staticmethod
    def moments(values: Tensor) -> dict[str, Tensor]:
        """Return the initial state for ``values``: both moments and the number of steps."""
        zeros = torch.zeros_like(values)
        return {"mean": zeros, "square": zeros.clone(), "steps": torch.zeros((), dtype=torch.int64)}

    def move(self, values: Tensor, gradient: Tensor, kept: Mapping[str, Tensor]) -> None:
        """Take one step, in place.

        Args:
            values: What is learned, float.
            gradient: Its gradient, of the same shape.
            kept: The state, with the keys of ``moments``; updated in place.
        """
        gradient = gradient.to(values.dtype)
        kept["steps"].add_(1)
        steps = int(kept["steps"])
        mean = kept["mean"].lerp_(gradient, 0.1)
        square = kept["square"].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = (square / (1 - 0.999**steps)).sqrt_().add_(1e-8)
        values.addcdiv_(mean, scale, value=-self.learning_rate / (1 - 0.9**steps))
