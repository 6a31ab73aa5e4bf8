"""Masked storage: ordinary parameters with zeros in place.

The parameter keeps its name, shape and dense gradient; sparsity is one pass over weights and gradients a step, a bitwise
"and" with masks of all ones or all zeros in integers as wide as the weights. It costs what a multiplication by masks in the
weights' dtype does (a fifteenth of one by bool masks), and unlike one it makes zeros of infinities and NaNs too.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dst.sharding import local
from dst.topology import Rewiring

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class BitMasks:
    """Integer masks in the parameters' width and layout, for the parameters that are not wholly active."""

    def __init__(self) -> None:
        self._tensors: dict[nn.Parameter, Tensor] = {}

    def set(self, parameter: nn.Parameter, mask: Tensor) -> None:
        """Take over a new mask (bool, of the shape of the parameter's local part) for a parameter."""
        if bool(mask.all()):
            self._tensors.pop(parameter, None)
        else:
            self._tensors[parameter] = _expand(mask, local(parameter.detach()))

    def rewire(self, parameter: nn.Parameter, rewiring: Rewiring) -> None:
        """Follow a topology update; positions are those of the local part."""
        if parameter in self._tensors:
            rewiring.apply_(self._tensors[parameter], one=-1)

    @torch.no_grad()
    def mask_weights(self, parameters: Iterable[nn.Parameter]) -> None:
        """Set the inactive weights of ``parameters`` to zero, in place."""
        for parameter in parameters:
            if parameter in self._tensors:
                self._apply(local(parameter.detach()), parameter)

    @torch.no_grad()
    def mask_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Set the gradients of inactive weights to zero, in place; parameters without one are passed over."""
        for parameter in parameters:
            if parameter in self._tensors and parameter.grad is not None:
                self._apply(local(parameter.grad), parameter)

    def _apply(self, tensor: Tensor, parameter: nn.Parameter) -> None:
        bits = self._tensors[parameter]
        if bits.device != tensor.device or bits.element_size() != tensor.element_size():
            bits = self._tensors[parameter] = _expand(bits.bool(), tensor)
        tensor.view(bits.dtype).bitwise_and_(bits)


def _expand(mask: Tensor, like: Tensor) -> Tensor:
    """-1 (all bits) where active and 0 elsewhere, laid out as ``like`` so that both are walked in one order."""
    return torch.empty_like(like, dtype=_INTEGERS[like.element_size()]).copy_(mask).neg_()
