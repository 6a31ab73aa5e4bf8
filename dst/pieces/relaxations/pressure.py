"""The controller that brings a learned density to its target."""

from __future__ import annotations

import math


def pressure(density: float, progress: float, target: float, steps: int) -> float:
    """Compute how far one step shifts a learned density: proportional to log(density / scheduled density).

    The scheduled density is target + (1 − target)·(1 − progress)³ (Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878).
    Papers that learn densities tune a penalty until the result fits; this closes the loop instead.

    Args:
        density: Present density of the network, in [0, 1].
        progress: Share of the learning phase that is over, >= 0; values above 1 count as 1.
        target: Density at the end of the phase, in (0, 1].
        steps: Length of the phase in optimizer steps, >= 1.

    Returns:
        A shift of a threshold on a logarithmic scale: positive where too many weights are active, negative where too few.
    """
    wanted = target + (1 - target) * (1 - min(1.0, progress)) ** 3
    # The log of a density can fall ten times as fast as the threshold rises: gains above 0.1 would oscillate.
    gain = min(0.1, 50 / steps)
    return gain * math.log(max(density, 1e-6) / wanted)
