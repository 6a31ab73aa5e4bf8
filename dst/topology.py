"""Pure functions on masks and scores: counting, selecting, dropping and growing.

Everything here works on one layer at a time, keeps counts as exact integers, and depends on nothing but its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction as Ratio

import numpy as np
import torch
from torch import Tensor

from dst.errors import ConfigurationError


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


def tie_key(generator: torch.Generator) -> int:
    """Draw the key of a choice among equals; see ``tie_order``."""
    return int(torch.randint(2**62, (), generator=generator))


def tie_order(positions: Tensor, key: int) -> Tensor:
    """Numbers by which positions that tie are ranked, the smallest first: a random order that needs no table.

    It is the finalizer of SplitMix64 (Steele et al. 2014), a bijection of 64-bit integers, of the position and the key.
    So the winners among ties are the same wherever and in whatever order they are met; the compiled kernels compute it too.

    Args:
        positions: Int64.
        key: What makes the order another one.

    Returns:
        Int64 of the same shape, distinct where positions are.
    """
    mixed = positions * -7046029254386353131 + key  # 0x9E3779B97F4A7C15, products modulo 2**64
    mixed = (mixed ^ (mixed >> 30 & (1 << 34) - 1)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27 & (1 << 37) - 1)) * -7723592293110705685  # 0x94D049BB133111EB
    return mixed ^ (mixed >> 31 & (1 << 33) - 1)


def top_indices(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Positions of the ``count`` largest entries of a vector, in increasing order.

    Ties at the threshold are broken by ``tie_order``, keyed by one draw from ``generator``: taking the first would grow
    every dead layer in its first rows, and ``torch.topk`` does not define which it takes.

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
    key = tie_key(generator)
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
        order = tie_order(ties if pool is None else pool[ties], key)
        ties = ties[order <= order.kthvalue(missing).values]
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
    """Select the ``count`` best candidates, ties among candidates broken as in ``top_indices``.

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


def random_indices(size: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw ``count`` of ``size`` indices, every set equally likely, with memory in proportion to ``count``.

    Args:
        size: Number of positions.
        count: Number to draw, 0 to ``size``.
        generator: CPU generator.

    Returns:
        Sorted distinct indices, int64 ``[count]``.

    Raises:
        ConfigurationError: ``count`` is out of range.
    """
    if not 0 <= count <= size:
        raise ConfigurationError(f"cannot choose {count} of {size} positions")
    if 2 * count > size:
        left = torch.ones(size, dtype=torch.bool)
        left[random_indices(size, size - count, generator)] = False
        return left.nonzero().squeeze(1)
    found = torch.empty(0, dtype=torch.int64)
    while found.numel() < count:
        missing = count - found.numel()
        # Enough to finish at the first attempt almost always; repeats are what the margin is for.
        draw = int(missing / (1 - (found.numel() + missing / 2) / size) * 1.02) + 16
        found = torch.cat([found, torch.randint(size, (draw,), generator=generator)]).unique()
    surplus = found.numel() - count
    if surplus:
        keep = torch.ones(found.numel(), dtype=torch.bool)
        keep[torch.randperm(found.numel(), generator=generator)[:surplus]] = False
        found = found[keep]
    return found


def random_free(size: int, barred: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` of the positions that are not barred, uniformly, with memory in proportion to what is barred.

    Args:
        size: Number of positions.
        barred: Sorted distinct positions that may not be drawn, int64.
        count: Number to draw.
        generator: CPU generator.

    Returns:
        Sorted distinct positions, int64 ``[count]``, on the device of ``barred``.

    Raises:
        ConfigurationError: Fewer than ``count`` positions are free.
    """
    ranks = random_indices(size - barred.numel(), count, generator).to(barred.device)
    free_before = barred - torch.arange(barred.numel(), device=barred.device)
    return ranks + torch.searchsorted(free_before, ranks, right=True)


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


def rewire(
    active: Tensor,
    ranking: Tensor,
    weights: int,
    count: int,
    grow: Callable[[int, Tensor], Tensor],
    *,
    regrow_dropped: bool,
    generator: torch.Generator,
) -> Rewiring:
    """Replace ``count`` connections, given as lists of positions: what every backend shares.

    RigL, Algorithm 1 (Evci et al. 2020, https://arxiv.org/abs/1911.11134). Inactive positions take no part in the drop:
    a connection grown at zero ties with a masked zero, and must not be lost for it.

    Args:
        active: Sorted positions of the active connections, int64.
        ranking: Their drop scores, float, in that order: the lowest are dropped.
        weights: Number of positions in the layer.
        count: Connections to drop, and then to grow; in [0, active].
        grow: Called with a number and the sorted positions that may not be chosen; returns that many other positions,
            sorted.
        regrow_dropped: Whether a connection dropped just now may be grown again at once, keeping its value, as in the
            authors' code (candidates are all positions not kept); it then counts as neither grown nor dropped. Otherwise
            candidates are the positions inactive before, and ``count`` is lowered to their number where there are fewer.
        generator: CPU generator that breaks ties of the drop.

    Returns:
        The rewiring; what was grown and what was kept never overlap.
    """
    if not regrow_dropped:
        count = min(count, weights - active.numel())
    # The lowest are those that the highest leave over, so that NaN goes first and ties are fair.
    is_kept = torch.zeros(active.numel(), dtype=torch.bool, device=active.device)
    is_kept[top_indices(ranking, active.numel() - count, generator)] = True
    out = active[~is_kept]
    grown = grow(count, active[is_kept] if regrow_dropped else active)
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


def drop_and_grow(
    mask: Tensor,
    drop_scores: Tensor,
    grow_scores: Tensor,
    count: int,
    *,
    regrow_dropped: bool,
    generator: torch.Generator,
) -> Rewiring:
    """``rewire`` for a mask and scores of every position.

    Args:
        mask: Bool, the current mask.
        drop_scores: Float, same shape: low scores among the active positions are dropped.
        grow_scores: Float, same shape: high scores among the candidates are grown.
        count: Connections to drop, and then to grow; in [0, active].
        regrow_dropped: As for ``rewire``.
        generator: CPU generator that breaks ties.

    Returns:
        The rewiring.
    """
    active = mask.reshape(-1).nonzero().squeeze(1)
    return rewire(
        active,
        drop_scores.take(active),
        mask.numel(),
        count,
        lambda number, barred: best_free(grow_scores, number, barred, generator),
        regrow_dropped=regrow_dropped,
        generator=generator,
    )


def best_free(scores: Tensor, count: int, barred: Tensor, generator: torch.Generator) -> Tensor:
    """The ``count`` positions with the highest scores that are not barred, ties broken as in ``top_indices``.

    Args:
        scores: Float, any shape; NaN counts as lowest.
        count: How many; at most as many as are free.
        barred: Positions that may not be chosen, int64.
        generator: CPU generator that breaks ties.

    Returns:
        Sorted row-major positions, int64.
    """
    lowest = torch.finfo(scores.dtype).min
    candidates = scores.reshape(-1).nan_to_num(nan=lowest, neginf=lowest)
    candidates[barred] = -math.inf
    return top_indices(candidates, count, generator)
