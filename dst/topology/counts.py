"""Whole numbers of connections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction as Ratio


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


def largest_remainders(ideal: Sequence[float], total: int, limits: Sequence[int], least: int = 0) -> list[int]:
    """Round numbers to whole ones of a given sum, by largest remainders.

    Args:
        ideal: Numbers >= 0.
        total: The sum, between that of ``least`` and that of ``limits``.
        limits: The most that each may be. Those whose ideal reaches it give last.
        least: The least that each may be.

    Returns:
        One whole number per ideal; among equal remainders the first gets more.
    """
    counts = [min(limit, max(least, math.floor(x))) for x, limit in zip(ideal, limits, strict=True)]
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        room = [i for i, c in enumerate(counts) if least <= c + step <= limits[i]]
        counts[max(room, key=lambda i: (ideal[i] < limits[i], step * (ideal[i] - counts[i])))] += step
    return counts


def apportion(total: int, shares: Sequence[float], limits: Sequence[int]) -> list[int]:
    """Split a whole number in proportion to shares, by largest remainders, within limits.

    Args:
        total: What to split, >= 0; at most the sum of ``limits``.
        shares: Finite claims, >= 0. Where those of all that have room are zero, the limits count instead.
        limits: The most that each may get.

    Returns:
        One whole number per share, which add up to ``total``.

    Raises:
        ValueError: ``total`` exceeds the sum of the limits.
    """
    if total > sum(limits):
        raise ValueError(f"cannot place {total} within limits that add up to {sum(limits)}")
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
            # Some are full: give the whole parts, and split what is left among the others in the next round.
            if not any(given.values()):
                given = dict.fromkeys([max(ideal, key=lambda i: ideal[i])], 1)
        else:
            room_left = [limits[i] - counts[i] for i in claims]
            given = dict(zip(claims, largest_remainders(list(ideal.values()), left, room_left), strict=True))
        for i, number in given.items():
            counts[i] += min(number, limits[i] - counts[i])
    return counts
