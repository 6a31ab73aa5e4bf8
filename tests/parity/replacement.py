"""Magnitude drop and growth of one layer by sorting, as in RigL (Evci et al. 2020, Algorithm 1), on flat tensors."""

from __future__ import annotations

from torch import Tensor


def drop_smallest(mask: Tensor, values: Tensor, number: int) -> None:
    """Make the active weights with the smallest magnitudes inactive, in place."""
    active = mask.nonzero().squeeze(1)
    mask[active[values[active].abs().argsort()[:number]]] = False


def grow_largest(mask: Tensor, values: Tensor, number: int) -> None:
    """Make the inactive weights with the largest magnitudes active, in place."""
    free = (~mask).nonzero().squeeze(1)
    mask[free[values[free].abs().argsort(descending=True)[:number]]] = True
