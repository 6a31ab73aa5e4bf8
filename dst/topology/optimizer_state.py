"""Per-weight optimizer state, recognized by its shape and not by the type of the optimizer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.optim import Optimizer

from dst.topology.rewiring import fill_at_
from dst.topology.sharding import local


def per_weight_state(optimizer: Optimizer, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The state tensors that hold one number per weight, such as momentum.

    Args:
        optimizer: Any optimizer.
        parameter: One of its parameters.

    Yields:
        Key and tensor, for every tensor of the parameter's shape.
    """
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0:
            yield key, value


def clear_state(optimizer: Optimizer, parameter: Tensor, positions: Tensor) -> None:
    """Set per-weight state to zero at ``positions``.

    Momentum of a dropped weight would move it away from zero again, or act on it as soon as it is regrown.

    Args:
        optimizer: Any optimizer.
        parameter: One of its parameters.
        positions: Row-major positions in the parameter, or in this rank's shard of it (int64).
    """
    for _, value in per_weight_state(optimizer, parameter):
        fill_at_(local(value), positions, 0)


def mask_state(optimizer: Optimizer, parameter: Tensor, mask: Tensor) -> None:
    """Set per-weight state to zero where ``mask`` (bool, of the local shard's shape) is False."""
    for _, value in per_weight_state(optimizer, parameter):
        local(value).masked_fill_(~mask, 0)
