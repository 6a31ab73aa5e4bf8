"""No pattern: each weight has a mask bit of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dst.topology.layers import SparseLayer
from dst.topology.rewiring import Rewiring, rewire
from dst.topology.selection import best_free, top_indices


@dataclass(frozen=True)
class Unstructured:
    """Unstructured sparsity: single weights, one budget per layer."""

    is_grouped: ClassVar[bool] = False
    is_free: ClassVar[bool] = True

    def spread(self, layer: SparseLayer, scores: Tensor) -> Tensor:
        """Return the scores themselves."""
        return scores

    def select(self, layer: SparseLayer, scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Return the sorted positions of the best ``count`` weights."""
        return top_indices(scores.reshape(-1), count, generator)

    def rewire(
        self,
        layer: SparseLayer,
        mask: Tensor,
        drop_scores: Tensor,
        grow_scores: Tensor | None,
        drop: int,
        grow: int,
        *,
        regrow_dropped: bool,
        generator: torch.Generator,
    ) -> Rewiring:
        """See ``Pattern``, and ``dst.topology.rewiring.rewire``."""
        active = mask.reshape(-1).nonzero().squeeze(1)

        def choose(count: int, excluded: Tensor) -> Tensor:
            return excluded[:0] if grow_scores is None else best_free(grow_scores, count, excluded, generator)

        return rewire(
            active,
            drop_scores.take(active),
            mask.numel(),
            drop,
            grow,
            choose,
            regrow_dropped=regrow_dropped,
            generator=generator,
        )

    def for_density(self, density: float) -> Unstructured:
        """Return the pattern itself."""
        return self

    def unsupported_reason(self, layer: SparseLayer) -> str | None:
        """Return ``None``: every layer can have it."""
        return None

    def fit(self, layer: SparseLayer, count: int) -> int:
        """Return ``count``."""
        return count

    def holds(self, layer: SparseLayer, mask: Tensor) -> bool:
        """Return True."""
        return True
