"""Rounding: densities, fractions and shares to whole numbers of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction as Ratio


def count_active(weights: int, density: float) -> int:
    """Active weights of a layer: ``N - floor((1 - density) * N)``, with the density read as an exact decimal.

    This is the rounding of google-research/rigl ``sparse_utils.get_mask_random`` (zeros = floor(sparsity * N)). The exact
    decimal matters: a density of 0.7 gives 7 of 10 weights, where binary floating point gives 8.

    Args:
        weights: Number of weights N, >= 0.
        density: In [0, 1].

    Returns:
        A count in [0, N]; at least 1 where N >= 1 and density > 0.
    """
    count = Ratio(repr(float(density))) * weights
    nearest = round(count)
    # Computed densities (ERK, powers of 0.8) carry rounding errors, which must not change the count.
    exact = nearest if abs(count - nearest) < 1e-6 else math.ceil(count)
    return max(exact, 1 if weights and density > 0 else 0)


def drop_count(active: int, fraction: float) -> int:
    """Number of weights that an update drops: ``floor(fraction * active)`` (RigL, Algorithm 1)."""
    # In binary floating point 0.29 * 100 is below 29.
    return min(active, math.floor(fraction * active + 1e-9))


def largest_remainders(ideal: Sequence[float], total: int, limits: Sequence[int], least: int = 0) -> list[int]:
    """Round numbers to integers with a given sum, by the largest remainder method.

    Args:
        ideal: Numbers >= 0.
        total: Sum of the result; at least ``least * len(ideal)`` and at most ``sum(limits)``.
        limits: Upper bound of each integer. Entries whose ideal reaches its bound are lowered last.
        least: Lower bound of every integer.

    Returns:
        One integer per entry of ``ideal``. Of equal remainders the first is rounded up.
    """
    counts = [min(limit, max(least, math.floor(x))) for x, limit in zip(ideal, limits, strict=True)]
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        room = [i for i, c in enumerate(counts) if least <= c + step <= limits[i]]
        counts[max(room, key=lambda i: (ideal[i] < limits[i], step * (ideal[i] - counts[i])))] += step
    return counts


def apportion(total: int, shares: Sequence[float], limits: Sequence[int]) -> list[int]:
    """Split an integer in proportion to shares, within limits, by the largest remainder method.

    Args:
        total: The integer to split, in [0, sum(limits)].
        shares: Finite numbers >= 0. If the shares of all entries below their limit are zero, the split is in proportion
            to the room that is left.
        limits: Upper bound of each part.

    Returns:
        One integer per share, with sum ``total``.

    Raises:
        ValueError: ``total`` exceeds the sum of the limits.
    """
    if total > sum(limits):
        raise ValueError(f"cannot split {total} within limits whose sum is {sum(limits)}")
    counts = [0] * len(shares)
    while (left := total - sum(counts)) > 0:
        room = [i for i, limit in enumerate(limits) if counts[i] < limit]
        claims = {i: shares[i] for i in room if shares[i] > 0 and math.isfinite(shares[i])}
        if not claims:
            claims = {i: float(limits[i] - counts[i]) for i in room}
        scale = left / sum(claims.values())
        ideal = {i: min(claim * scale, limits[i] - counts[i]) for i, claim in claims.items()}
        given = {i: math.floor(x) for i, x in ideal.items()}
        if any(ideal[i] < claims[i] * scale for i in claims):
            # Some entries reach their limit: give all their integer parts and split the rest in the next round.
            if not any(given.values()):
                given = dict.fromkeys([max(ideal, key=lambda i: ideal[i])], 1)
        else:
            room_left = [limits[i] - counts[i] for i in claims]
            given = dict(zip(claims, largest_remainders(list(ideal.values()), left, room_left), strict=True))
        for i, number in given.items():
            counts[i] += min(number, limits[i] - counts[i])
    return counts
