"""Optimizer state at positions whose connection came or went, found by shape and never by optimizer type."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.optim import Optimizer

from dst.layers import SparseLayer
from dst.topology import fill_at_


def per_weight_state(optimizer: Optimizer, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The state tensors that hold one number per weight: momentum, moments, and whatever else has the shape.

    Args:
        optimizer: Any optimizer.
        parameter: One of its parameters.

    Yields:
        Key and tensor, for every tensor of the parameter's shape.
    """
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0:
            yield key, value


def clear_state(optimizer: Optimizer, parameter: Tensor, layer: SparseLayer, positions: Tensor) -> None:
    """Set per-weight state to zero at ``positions`` of a layer.

    Momentum left at a dropped connection would move it away from zero again, or push it off at once when it is regrown.

    Args:
        optimizer: Any optimizer.
        parameter: One of its parameters.
        layer: The layer that is the parameter, or a part of it.
        positions: Row-major positions in the layer (int64).
    """
    for _, value in per_weight_state(optimizer, parameter):
        fill_at_(layer.part(value), positions, 0)


def mask_state(optimizer: Optimizer, parameter: Tensor, mask: Tensor) -> None:
    """Set per-weight state to zero where ``mask`` (bool, of the parameter's shape) is False."""
    for _, value in per_weight_state(optimizer, parameter):
        value.masked_fill_(~mask, 0)
