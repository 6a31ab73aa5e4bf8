"""Masks in a checkpoint: bool tensors or sorted row-major positions. All backends read both."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dst.backends.explored import Explored
from dst.topology.layers import SparseLayer
from dst.topology.rewiring import fill_at_


def is_mask(saved: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a saved mask for a weight of this shape."""
    if saved.dtype == torch.bool:
        return saved.shape == shape
    if saved.dtype not in (torch.int32, torch.int64) or saved.ndim != 1:
        return False
    ends_fit = saved.numel() == 0 or (int(saved[0]) >= 0 and int(saved[-1]) < math.prod(shape))
    return ends_fit and bool((saved[1:] > saved[:-1]).all())


def is_union(saved: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a saved union of masks for a weight of this shape."""
    if saved.dtype == torch.bool:
        return saved.shape == shape
    return saved.dtype == torch.uint8 and saved.shape == Explored(math.prod(shape), shape[-1]).bits.shape


def count(saved: Tensor, layer: SparseLayer | None = None) -> int:
    """Number of active weights in the saved mask of a parameter, or of a layer in it."""
    if saved.dtype == torch.bool:
        return int((saved if layer is None else layer.part(saved)).sum())
    if layer is None or layer.rows is None:
        return saved.numel()
    first, last = torch.searchsorted(saved, torch.tensor([layer.offset, layer.offset + layer.weights])).tolist()
    return int(last - first)


def as_mask(saved: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A saved mask as a new bool tensor."""
    if saved.dtype == torch.bool:
        return saved.clone()
    return fill_at_(torch.zeros(shape, dtype=torch.bool), saved.to(torch.int64), 1)


def as_positions(saved: Tensor) -> Tensor:
    """A saved mask as sorted positions, int64, on the CPU."""
    if saved.dtype == torch.bool:
        return saved.reshape(-1).nonzero().squeeze(1).cpu()
    return saved.to(torch.int64)


def narrow(positions: Tensor, size: int) -> Tensor:
    """Positions in [0, ``size``), as int32 if they fit."""
    return positions.to(torch.int32) if size <= 1 << 31 else positions


def union_as_mask(saved: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A saved union of masks (bool, or one bit per position) as a bool tensor."""
    if saved.dtype == torch.bool:
        return saved.clone()
    return as_mask(Explored(math.prod(shape), shape[-1], saved).positions(), shape)


def union_as_bits(saved: Tensor, shape: tuple[int, ...]) -> Explored:
    """A saved union of masks (bool, or one bit per position) as a set."""
    if saved.dtype != torch.bool:
        return Explored(math.prod(shape), shape[-1], saved)
    explored = Explored(math.prod(shape), shape[-1])
    explored.add(as_positions(saved))
    return explored
