"""Constant fan-in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.pieces.patterns.grouped import (
    Grouped,
    matrix_of,
    matrix_shape,
)
from dst.topology.layers import SparseLayer
from dst.topology.selection import top_indices


@dataclass(frozen=True)
class FanIn(Grouped):
    """Constant fan-in: every output has the same number of active inputs (SRigL; Lasby et al. 2024, arXiv:2305.02299).

    With ``ablate`` > 0, an update removes unimportant outputs (section 3.2 of the paper). A connection is salient if the
    drop score keeps it, or if its grow score is among the best of the layer, up to the budget. An output with fewer salient
    connections than ``ablate`` times the fan-in is removed. The remaining outputs share the budget, so their fan-in rises. A
    removed output returns when it has enough salient connections.

    Deviations: the fan-in is an integer, so a layer's count is fan-in times remaining outputs, at most the budget. At least
    one output stays, and every remaining output has a salient connection. The authors count the best grow scores among kept
    connections too.

    Attributes:
        ablate: γ_sal, share of the fan-in, in [0, 1]; 0 keeps all outputs. The authors use 0.3 for convolutional networks.
    """

    ablate: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.ablate <= 1:
            raise ConfigurationError(f"ablate={self.ablate} must lie in [0, 1]")

    def arrange(self, layer: SparseLayer, tensor: Tensor, absent: float = 0) -> Tensor:
        """See ``Grouped``."""
        return matrix_of(layer, tensor)[:, :, None]

    def fit(self, layer: SparseLayer, count: int) -> int:
        """See ``Pattern``: a multiple of the number of outputs."""
        outputs, inputs = matrix_shape(layer)
        return min(inputs, max(1, round(count / outputs))) * outputs

    def holds(self, layer: SparseLayer, mask: Tensor) -> bool:
        """See ``Grouped``; removed outputs have no active inputs."""
        per_output = matrix_of(layer, mask).sum(1)
        remaining = per_output[per_output > 0] if self.ablate else per_output
        return remaining.numel() > 0 and bool((remaining == remaining[0]).all())

    def _quotas_after(
        self,
        layer: SparseLayer,
        target: int,
        exists: Tensor,
        kept: Tensor,
        wanted: Tensor,
        active: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        if self.ablate == 0:
            return self._quotas(layer, target, exists)
        salient = kept.clone()
        room = min(max(0, target - int(kept.sum())), int((wanted > -math.inf).sum()))
        salient.view(-1)[top_indices(wanted.reshape(-1), room, generator)] = True
        per_row = salient.sum(1)
        fan_in = target / max(1, int(active.any(1).sum()))
        remaining = per_row >= max(1, math.ceil(self.ablate * fan_in))
        if not remaining.any():
            remaining[per_row.argmax()] = True
        quota = min(exists.shape[1], max(1, target // int(remaining.sum())))
        return remaining.to(torch.int64) * quota
