"""Selecting positions of one layer by score or at random, with exact counts and seeded tie-breaking."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dst.errors import ConfigurationError


def tie_key(generator: torch.Generator) -> int:
    """Draw a key for ``tie_order``."""
    return int(torch.randint(2**62, (), generator=generator))


def tie_order(positions: Tensor, key: int) -> Tensor:
    """Ranks that break ties between positions: the smallest wins.

    The rank is the finalizer of SplitMix64 (Steele et al. 2014), a bijection of 64-bit integers, applied to position and
    key. It does not depend on device or order of evaluation. The compiled kernels compute the same ranks.

    Args:
        positions: Int64.
        key: Selects the order.

    Returns:
        Int64 of the same shape. Distinct positions have distinct ranks.
    """
    mixed = positions * -7046029254386353131 + key  # 0x9E3779B97F4A7C15, products modulo 2**64
    mixed = (mixed ^ (mixed >> 30 & (1 << 34) - 1)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27 & (1 << 37) - 1)) * -7723592293110705685  # 0x94D049BB133111EB
    return mixed ^ (mixed >> 31 & (1 << 33) - 1)


def top_indices(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Positions of the ``count`` largest entries of a vector, in increasing order.

    Ties at the threshold are broken by ``tie_order``, keyed by one draw from ``generator``. Taking the first would grow
    the first rows of a layer without gradient, and ``torch.topk`` does not define which ties it takes.

    Args:
        values: Float vector. NaN ranks lowest.
        count: Number of positions, in [0, values.numel()].
        generator: CPU generator that breaks ties.

    Returns:
        Int64 vector of ``count`` distinct positions, on the device of ``values``.

    Raises:
        ValueError: ``count`` is out of range.
    """
    return best_indices(values, count, tie_key(generator))


def best_indices(values: Tensor, count: int, key: int) -> Tensor:
    """`top_indices` with the key of ``tie_order`` instead of a generator."""
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
        order = tie_order(ties if pool is None else pool[ties], key)
        ties = ties[order <= order.kthvalue(missing).values]
    above[ties] = True
    chosen = above.nonzero().squeeze(1)
    return chosen if pool is None else pool[chosen]


def _likely_top(values: Tensor, count: int) -> Tensor | None:
    """A small set of positions that contains the top ``count``, or ``None`` if a sample does not find one.

    Growth selects a few percent of a layer. A threshold estimated from a sample leaves few positions to partition. Their
    number is checked, so a bad estimate costs time and never changes the result.
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


def partition(positions: Tensor, scores: Tensor, keep: int, key: int) -> tuple[Tensor, Tensor]:
    """Split positions by score into those that stay and the others.

    Args:
        positions: Sorted, int64 ``[n]``.
        scores: Float ``[n]``. The highest stay; NaN ranks lowest.
        keep: How many stay, in [0, n].
        key: Key of ``tie_order``, which breaks ties between indices of ``positions``.

    Returns:
        The positions that stay and the others, both sorted.
    """
    stays = torch.zeros(positions.numel(), dtype=torch.bool, device=positions.device)
    stays[best_indices(scores, keep, key)] = True
    return positions[stays], positions[~stays]


def cancel(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Remove from both vectors what both contain; they are sorted, distinct and int64."""
    return without(a, b), without(b, a)


def without(positions: Tensor, removed: Tensor) -> Tensor:
    """The positions that are not in ``removed``; both are sorted and int64."""
    if removed.numel() == 0:
        return positions
    return positions[removed[torch.searchsorted(removed, positions).clamp_(max=removed.numel() - 1)] != positions]


def select_top(scores: Tensor, count: int, candidates: Tensor, generator: torch.Generator) -> Tensor:
    """Select the ``count`` candidates with the highest scores. Ties are broken as in ``top_indices``.

    Args:
        scores: Float tensor of any shape. NaN ranks lowest.
        count: Number to select; at most the number of candidates.
        candidates: Bool tensor of the same shape: the positions that may be selected.
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
    """Draw ``count`` of ``size`` indices uniformly without replacement, in O(``count``) memory.

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
        # The margin covers repeated draws: the first attempt almost always suffices.
        draw = int(missing / (1 - (found.numel() + missing / 2) / size) * 1.02) + 16
        found = torch.cat([found, torch.randint(size, (draw,), generator=generator)]).unique()
    surplus = found.numel() - count
    if surplus:
        keep = torch.ones(found.numel(), dtype=torch.bool)
        keep[torch.randperm(found.numel(), generator=generator)[:surplus]] = False
        found = found[keep]
    return found


def stable_order(values: Tensor) -> Tensor:
    """Positions of a vector's entries in increasing order, as ``values.argsort(stable=True)`` gives them.

    Args:
        values: Float vector, positive. No NaN.

    Returns:
        Int64 vector of the same length, on the device of ``values``.
    """
    if values.device.type != "cpu" or values.dtype.itemsize > 4:
        return values.argsort(stable=True)
    # The bits of positive floats order as integers. With the index in the low bits all keys differ, and any sort is stable.
    bits = values.float().contiguous().view(torch.int32).to(torch.int64)
    keys = (bits << 32) + torch.arange(values.numel())
    return torch.from_numpy(np.sort(keys.numpy())) & (1 << 32) - 1


def random_free(size: int, excluded: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` positions that are not excluded, uniformly without replacement, in O(``excluded``) memory.

    Args:
        size: Number of positions.
        excluded: Sorted distinct positions that may not be drawn, int64.
        count: Number to draw.
        generator: CPU generator.

    Returns:
        Sorted distinct positions, int64 ``[count]``, on the device of ``excluded``.

    Raises:
        ConfigurationError: Fewer than ``count`` positions are not excluded.
    """
    ranks = random_indices(size - excluded.numel(), count, generator).to(excluded.device)
    free_before = excluded - torch.arange(excluded.numel(), device=excluded.device)
    return ranks + torch.searchsorted(free_before, ranks, right=True)


def best_free(scores: Tensor, count: int, excluded: Tensor, generator: torch.Generator) -> Tensor:
    """The ``count`` highest-scoring positions that are not excluded. Ties are broken as in ``top_indices``.

    Args:
        scores: Float, any shape. NaN ranks lowest.
        count: Number of positions; at most the number that is not excluded.
        excluded: Positions that may not be chosen, int64.
        generator: CPU generator that breaks ties.

    Returns:
        Sorted row-major positions, int64.
    """
    lowest = torch.finfo(scores.dtype).min
    candidates = scores.reshape(-1).nan_to_num(nan=lowest, neginf=lowest)
    candidates[excluded] = -math.inf
    return top_indices(candidates, count, generator)
