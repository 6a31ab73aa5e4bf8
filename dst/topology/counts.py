"""Whole numbers of connections."""

from __future__ import annotations

import math
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
