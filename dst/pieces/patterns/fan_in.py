"""The same number of inputs for every output."""

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
    """Constant fan-in: every output has the same number of inputs (SRigL; Lasby et al. 2024, arXiv:2305.02299).

    With ``ablate`` > 0, an update removes outputs of little importance: those fewer of whose connections than that share
    of the fan-in are salient. Salient are the connections that the drop score keeps, and as many as would make up the
    budget with the best growth scores of the layer. The budget moves to the outputs that remain, whose fan-in rises; an
    output that was removed returns where enough of its connections become salient (section 3.2 there).

    Deviations: the fan-in is a whole number, so a layer's count is the product of it and the remaining outputs, at most
    the budget. At least one output stays, and those that stay have a salient connection. The authors count the best
    growth scores among kept connections too.

    Attributes:
        ablate: γ_sal, the share of a fan-in, in [0, 1]; 0 keeps all outputs. The authors use 0.3 for convolutional
            networks.
    """

    ablate: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.ablate <= 1:
            raise ConfigurationError(f"ablate={self.ablate} must lie in [0, 1]")

    def arrange(self, layer: SparseLayer, tensor: Tensor, absent: float = 0) -> Tensor:
        """See ``Grouped``."""
        return matrix_of(layer, tensor)[:, :, None]

    def fit(self, layer: SparseLayer, count: int) -> int:
        """See ``Unstructured``: a multiple of the number of outputs."""
        outputs, inputs = matrix_shape(layer)
        return min(inputs, max(1, round(count / outputs))) * outputs

    def holds(self, layer: SparseLayer, mask: Tensor) -> bool:
        """See ``Grouped``; outputs that were removed have no inputs."""
        per_output = matrix_of(layer, mask).sum(1)
        alive = per_output[per_output > 0] if self.ablate else per_output
        return alive.numel() > 0 and bool((alive == alive[0]).all())

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
        alive = per_row >= max(1, math.ceil(self.ablate * fan_in))
        if not alive.any():
            alive[per_row.argmax()] = True
        # All outputs of a layer share the fan-in that its budget gives those which are left.
        quota = min(exists.shape[1], max(1, target // int(alive.sum())))
        return alive.to(torch.int64) * quota
