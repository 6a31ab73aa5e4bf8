"""The topology update of one layer: dropped and grown positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dst.topology import selection
from dst.topology.selection import tie_key


class SortedSets(Protocol):
    """`partition` and `cancel` of ``dst.topology.selection``."""

    def partition(self, positions: Tensor, scores: Tensor, keep: int, key: int) -> tuple[Tensor, Tensor]:
        """Split positions by score into those that stay and the others."""
        ...

    def cancel(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Remove from both vectors what both contain."""
        ...


@dataclass(frozen=True)
class Rewiring:
    """The positions that an update grows and drops in one layer.

    Attributes:
        grown: Positions that become active; int64, row-major in the layer.
        dropped: Positions that become inactive; int64, row-major in the layer.
    """

    grown: Tensor
    dropped: Tensor

    def apply_(self, mask: Tensor, one: int = 1) -> Tensor:
        """Set ``mask`` (the layer's shape, any dtype and strides) to ``one`` where grown and 0 where dropped, in place."""
        return fill_at_(fill_at_(mask, self.dropped, 0), self.grown, one)


def fill_at_(tensor: Tensor, positions: Tensor, value: float) -> Tensor:
    """Set ``tensor`` (any strides) to ``value`` at row-major ``positions`` (int64), in place."""
    return tensor.put_(positions, torch.full(positions.shape, value, dtype=tensor.dtype, device=tensor.device))


def rewire(
    active: Tensor,
    ranking: Tensor,
    weights: int,
    drop: int,
    grow: int,
    choose: Callable[[int, Tensor], Tensor],
    *,
    regrow_dropped: bool,
    generator: torch.Generator,
    sets: SortedSets = selection,
) -> Rewiring:
    """Drop the active positions with the lowest scores and grow others. All backends share this.

    With ``grow == drop`` this is RigL, Algorithm 1 (Evci et al. 2020, https://arxiv.org/abs/1911.11134). Only active
    positions are ranked: a grown weight that is still zero would tie with the zeros of inactive positions.

    Args:
        active: Sorted active positions, int64.
        ranking: Drop scores of ``active``, float. The lowest are dropped.
        weights: Number of positions in the layer.
        drop: Number of weights to drop, in [0, active].
        grow: Number of weights to grow; ``active - drop + grow`` is at most ``weights``.
        choose: Called with a count and the sorted excluded positions. Returns that many other positions, sorted.
        regrow_dropped: Whether a weight dropped in this update may be grown again and keeps its value, as in the authors'
            code. Candidates are then all positions that are not kept, and a regrown weight counts as neither grown nor
            dropped. Otherwise candidates are the positions that were inactive before the update, and both counts are
            lowered by the same number if there are too few.
        generator: CPU generator that breaks ties of the drop.
        sets: Computes with sorted positions: torch's operations, or the kernels' on the CPU. The result is the same.

    Returns:
        The grown and the dropped positions.
    """
    if not regrow_dropped:
        surplus = max(0, grow - (weights - active.numel()))
        drop, grow = drop - surplus, grow - surplus
    # Selecting the highest to keep drops NaN first and breaks ties at random.
    kept, dropped = sets.partition(active, ranking, active.numel() - drop, tie_key(generator))
    grown = choose(grow, kept if regrow_dropped else active)
    return Rewiring(*sets.cancel(grown, dropped)) if regrow_dropped else Rewiring(grown, dropped)
