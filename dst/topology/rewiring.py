"""A topology update of one layer: which positions are dropped and which are grown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dst.topology.selection import top_indices


@dataclass(frozen=True)
class Rewiring:
    """What one update does to one layer.

    Attributes:
        grown: Positions active after and inactive before (0 to 1); int64, row-major in the layer.
        dropped: Positions inactive after and active before (1 to 0).
    """

    grown: Tensor
    dropped: Tensor

    def apply_(self, mask: Tensor, one: int = 1) -> Tensor:
        """Change ``mask`` (any dtype and layout, of the layer's shape) in place: ``one`` where grown, 0 where dropped."""
        return fill_at_(fill_at_(mask, self.dropped, 0), self.grown, one)


def fill_at_(tensor: Tensor, positions: Tensor, value: float) -> Tensor:
    """Set ``tensor`` to ``value`` at row-major ``positions`` (int64), in place, whatever its strides."""
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
) -> Rewiring:
    """Drop connections and grow others, given as lists of positions: what every backend shares.

    RigL, Algorithm 1 (Evci et al. 2020, https://arxiv.org/abs/1911.11134), where as many are grown as dropped. Inactive
    positions take no part in the drop: a connection grown at zero ties with a masked zero, and must not be lost for it.

    Args:
        active: Sorted positions of the active connections, int64.
        ranking: Their drop scores, float, in that order: the lowest are dropped.
        weights: Number of positions in the layer.
        drop: Connections to drop; in [0, active].
        grow: Connections to grow; ``active - drop + grow`` is at most ``weights``.
        choose: Called with a number and the sorted positions that may not be chosen; returns that many other positions,
            sorted.
        regrow_dropped: Whether a connection dropped just now may be grown again at once, keeping its value, as in the
            authors' code (candidates are all positions not kept); it then counts as neither grown nor dropped. Otherwise
            candidates are the positions inactive before, and both numbers are lowered alike where there are too few.
        generator: CPU generator that breaks ties of the drop.

    Returns:
        The rewiring; what was grown and what was kept never overlap.
    """
    if not regrow_dropped:
        surplus = max(0, grow - (weights - active.numel()))
        drop, grow = drop - surplus, grow - surplus
    # The lowest are those that the highest leave over, so that NaN goes first and ties are fair.
    is_kept = torch.zeros(active.numel(), dtype=torch.bool, device=active.device)
    is_kept[top_indices(ranking, active.numel() - drop, generator)] = True
    out = active[~is_kept]
    grown = choose(grow, active[is_kept] if regrow_dropped else active)
    if not regrow_dropped:
        return Rewiring(grown, out)
    back = _are_in(grown, out)
    gone = torch.ones_like(out, dtype=torch.bool)
    gone[torch.searchsorted(out, grown[back])] = False
    return Rewiring(grown[~back], out[gone])


def _are_in(positions: Tensor, among: Tensor) -> Tensor:
    """Whether each of the positions is among others, which are sorted; bool."""
    if among.numel() == 0:
        return torch.zeros_like(positions, dtype=torch.bool)
    return among[torch.searchsorted(among, positions).clamp_(max=among.numel() - 1)] == positions


def without(positions: Tensor, removed: Tensor) -> Tensor:
    """The positions that are not among the removed; both sorted and int64."""
    return positions[~_are_in(positions, removed)]
