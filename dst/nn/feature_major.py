"""A dense linear layer for the storage order that sparse layers use."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeatureMajorLinear(nn.Linear):
    """A dense ``nn.Linear`` that computes feature-major, for the dense head after sparse layers.

    Parameters, state_dict and results are those of ``nn.Linear``. The input and its gradient keep the feature-major
    storage that sparse layers use, so neither is transposed.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> FeatureMajorLinear:
        """Take over the parameters (the same objects) of ``linear``."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.__dict__.update(linear.__dict__)
        return new

    def to_linear(self) -> nn.Linear:
        """Return an ``nn.Linear`` with the same parameters (the same objects)."""
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
