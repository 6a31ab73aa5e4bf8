"""Converting between sparse layers and dense ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from dst.errors import ConfigurationError

if TYPE_CHECKING:
    from dst.nn.sparse_linear import SparseLinear

Dense = TypeVar("Dense", bound=nn.Module)


def from_linear(kind: type[SparseLinear], linear: nn.Linear, mask: Tensor, relu: bool) -> SparseLinear:
    """Create a layer of class ``kind`` from the masked weight of ``linear``; see `SparseLinear.from_linear`."""
    weight = linear.weight.detach()
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ConfigurationError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; a bool mask of shape {tuple(weight.shape)} is needed"
        )
    indices = mask.reshape(-1).nonzero().squeeze(1)
    layer = kind(
        linear.in_features, linear.out_features, indices, weight.reshape(-1)[indices],
        bias=linear.bias is not None, relu=relu,
    )  # fmt: skip
    layer.values.requires_grad_(linear.weight.requires_grad)
    if layer.bias is not None:
        with torch.no_grad():
            layer.bias.copy_(linear.bias)
        layer.bias.requires_grad_(linear.bias.requires_grad)
    return layer.train(linear.training)


def filled(dense: Dense, layer: SparseLinear) -> Dense:
    """Copy the weight and bias of ``layer`` into a dense module, set it to the same mode, and return it."""
    with torch.no_grad():
        dense.get_parameter("weight").copy_(layer.dense_weight())
        if layer.bias is None:
            dense.register_parameter("bias", None)
        else:
            dense.get_parameter("bias").copy_(layer.bias)
    return dense.train(layer.training)
