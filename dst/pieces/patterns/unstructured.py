"""No pattern: every weight is active or not by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dst.topology.layers import SparseLayer
from dst.topology.rewiring import Rewiring, rewire
from dst.topology.selection import best_free, top_indices


@dataclass(frozen=True)
class Unstructured:
    """Every weight for itself, one budget per layer."""

    @property
    def is_grouped(self) -> bool:
        """Never."""
        return False

    @property
    def is_free(self) -> bool:
        """Always."""
        return True

    def spread(self, layer: SparseLayer, scores: Tensor) -> Tensor:
        """The scores themselves."""
        return scores

    def select(self, layer: SparseLayer, scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Sorted positions of the best ``count`` weights."""
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
        """As ``dst.topology.rewiring.rewire``."""
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
        """The pattern with what depends on the network's density resolved: itself."""
        return self

    def unsupported_reason(self, layer: SparseLayer) -> str | None:
        """Why the layer cannot have the pattern (it stays dense then), or ``None``."""
        return None

    def fit(self, layer: SparseLayer, count: int) -> int:
        """The number of active weights that comes nearest to ``count`` and the pattern can hold."""
        return count

    def holds(self, layer: SparseLayer, mask: Tensor) -> bool:
        """Always."""
        return True
