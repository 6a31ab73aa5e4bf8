"""Pure functions on masks and scores: counting, selecting, dropping and growing.

Everything here works on one layer at a time, keeps counts as exact integers, and depends on nothing but its arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction as Ratio

import numpy as np
import torch
from torch import Tensor


def count_active(weights: int, density: float) -> int:
    """Active weights of a layer: ``N - floor((1 - density) * N)``, with the density read as an exact decimal.

    This is the rounding of google-research/rigl ``sparse_utils.get_mask_random`` (zeros = floor(sparsity * N)); reading
    ``density`` as the decimal that was written keeps 0.7 of 10 at 7 where binary floats would say 8.

    Args:
        weights: Number of weights N, >= 0.
        density: In [0, 1].

    Returns:
        A count in [0, N]; at least 1 where N >= 1 and density > 0.
    """
    count = Ratio(repr(float(density))) * weights
    nearest = round(count)
    # Solved densities (ERK's, powers of 0.8) carry rounding errors that must not cost or bring a weight.
    exact = nearest if abs(count - nearest) < 1e-6 else math.ceil(count)
    return max(exact, 1 if weights and density > 0 else 0)


def drop_count(active: int, fraction: float) -> int:
    """How many of ``active`` connections an update drops: ``floor(fraction * active)`` (RigL, Algorithm 1)."""
    # The nudge keeps products such as 0.29 * 100 from falling one short of what the decimal says.
    return min(active, math.floor(fraction * active + 1e-9))


def top_indices(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Positions of the ``count`` largest entries of a vector, in increasing order.

    Ties at the threshold are broken at random from ``generator``: taking the first would grow every dead layer in its
    first rows, and ``torch.topk`` does not define which it takes.

    Args:
        values: Float vector; NaN counts as lowest.
        count: How many, in [0, values.numel()].
        generator: CPU generator that breaks ties.

    Returns:
        Int64 vector of ``count`` distinct positions, on the device of ``values``.

    Raises:
        ValueError: ``count`` is out of range.
    """
    available = values.numel()
    if not 0 <= count <= available:
        raise ValueError(f"cannot select {count} of {available} candidates")
    if count == available:
        return torch.arange(available, device=values.device)
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    if values.dtype.itemsize < 4:
        values = values.float()
    pool = _likely_top(values, count)
    if pool is None:
        values = values.masked_fill(values.isnan(), -math.inf)
    else:
        values = values[pool]
    threshold = _kth_largest(values, count)
    above = values > threshold
    ties = (values == threshold).nonzero().squeeze(1)
    missing = count - int(above.count_nonzero())
    if missing < ties.numel():
        ties = ties[torch.randperm(ties.numel(), generator=generator)[:missing].to(ties.device)]
    above[ties] = True
    chosen = above.nonzero().squeeze(1)
    return chosen if pool is None else pool[chosen]


def _likely_top(values: Tensor, count: int) -> Tensor | None:
    """Positions that hold the top ``count`` and not many more, or ``None`` where none are found cheaply.

    Growth picks a few percent of a layer. A threshold estimated from a sample leaves a small pool to partition; that the
    pool is large enough is checked, so the estimate costs time at worst and never a wrong choice.
    """
    available, sample_size = values.numel(), 8192
    if available < 4 * sample_size or count > available // 8:
        return None
    sample = values[:: available // sample_size | 1]
    rank = min(sample.numel(), math.ceil(1.5 * count / available * sample.numel()) + 48)
    pool = (values >= _kth_largest(sample, rank)).nonzero().squeeze(1)
    return pool if count <= pool.numel() < available // 2 else None


def _kth_largest(values: Tensor, count: int) -> Tensor:
    """The ``count``-th largest entry of a vector."""
    if values.device.type == "cpu":
        # A partition in numpy is linear and several times faster than topk at these sizes.
        position = values.numel() - count
        return values.new_tensor(np.partition(values.numpy(), position)[position])
    return values.kthvalue(values.numel() - count + 1).values


def select_top(scores: Tensor, count: int, candidates: Tensor, generator: torch.Generator) -> Tensor:
    """Select the ``count`` best candidates, ties broken as in ``top_indices``.

    Args:
        scores: Float tensor of any shape; NaN counts as lowest.
        count: How many to select; at most the number of candidates.
        candidates: Bool tensor of the same shape: the only positions that may be selected.
        generator: CPU generator that breaks ties.

    Returns:
        Bool tensor of the same shape with exactly ``count`` True.

    Raises:
        ValueError: Fewer than ``count`` candidates.
    """
    index = candidates.reshape(-1).nonzero().squeeze(1)
    selected = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    selected[index[top_indices(scores.reshape(-1)[index], count, generator)]] = True
    return selected.view(scores.shape)


@dataclass(frozen=True)
class Rewiring:
    """What one update does to one layer.

    Attributes:
        grown: Positions active after and inactive before (0 to 1); int64, row-major in the layer.
        dropped: Positions inactive after and active before (1 to 0); as many as grown.
    """

    grown: Tensor
    dropped: Tensor

    def apply_(self, mask: Tensor, one: int = 1) -> Tensor:
        """Change ``mask`` (any dtype and layout, of the layer's shape) in place: ``one`` where grown, 0 where dropped."""
        return fill_at_(fill_at_(mask, self.dropped, 0), self.grown, one)


def fill_at_(tensor: Tensor, positions: Tensor, value: float) -> Tensor:
    """Set ``tensor`` to ``value`` at row-major ``positions`` (int64), in place, whatever its strides."""
    return tensor.put_(positions, torch.full(positions.shape, value, dtype=tensor.dtype, device=tensor.device))


def drop_and_grow(
    mask: Tensor,
    drop_scores: Tensor,
    grow_scores: Tensor,
    count: int,
    *,
    regrow_dropped: bool,
    generator: torch.Generator,
) -> Rewiring:
    """Replace ``count`` connections: drop the lowest drop scores, grow the highest grow scores.

    RigL, Algorithm 1 (Evci et al. 2020, https://arxiv.org/abs/1911.11134). Inactive positions take no part in the drop
    by the mask, not by their value: a connection grown at zero ties with a masked zero, and must not be lost for it.

    Args:
        mask: Bool, the current mask.
        drop_scores: Float, same shape: low scores among the active positions are dropped.
        grow_scores: Float, same shape: high scores among the candidates are grown.
        count: Connections to drop, and then to grow; in [0, active].
        regrow_dropped: Whether a connection dropped just now may be grown again at once, keeping its value, as in the
            authors' code (candidates are all positions not kept); it then counts as neither grown nor dropped. Otherwise
            candidates are the positions inactive before, and ``count`` is lowered to their number where there are fewer.
        generator: CPU generator that breaks ties.

    Returns:
        The rewiring; what was grown and what was kept never overlap.
    """
    active = mask.reshape(-1).nonzero().squeeze(1)
    if not regrow_dropped:
        count = min(count, mask.numel() - active.numel())
    ranking = drop_scores.take(active)
    # The lowest are those that the highest leave over, so that NaN goes first and ties are fair.
    is_kept = torch.zeros(active.numel(), dtype=torch.bool, device=mask.device)
    is_kept[top_indices(ranking, active.numel() - count, generator)] = True
    out = active[~is_kept]
    barred = active[is_kept] if regrow_dropped else active
    lowest = torch.finfo(grow_scores.dtype).min
    candidate_scores = grow_scores.reshape(-1).nan_to_num(nan=lowest, neginf=lowest)
    candidate_scores[barred] = -math.inf
    grown = top_indices(candidate_scores, count, generator)
    if not regrow_dropped:
        return Rewiring(grown, out)
    back = mask.take(grown)
    gone = torch.ones_like(out, dtype=torch.bool)
    gone[torch.searchsorted(out, grown[back])] = False  # both are in increasing order
    return Rewiring(grown[~back], out[gone])
