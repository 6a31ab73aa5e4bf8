"""A dense linear layer that reads and writes feature-major activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeatureMajorLinear(nn.Linear):
    """A dense ``nn.Linear`` with feature-major activations, for dense layers between sparse ones.

    Parameters, state_dict and results are those of ``nn.Linear``. The input and its gradient keep the feature-major
    strides of sparse layers, so neither is transposed.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> FeatureMajorLinear:
        """Create the layer from ``linear``. They share parameters."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.__dict__.update(linear.__dict__)
        return new

    def to_linear(self) -> nn.Linear:
        """Return an ``nn.Linear`` that shares the parameters."""
        new = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(new)
        new.__dict__.update(self.__dict__)
        return new

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``(*, in_features)``."""
        if x.dim() != 2 or x.stride(0) != 1 or x.shape[0] < 2:
            return super().forward(x)
        if self.bias is None:
            return torch.mm(self.weight, x.t()).t()
        return torch.addmm(self.bias.unsqueeze(1), self.weight, x.t()).t()
