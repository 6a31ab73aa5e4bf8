"""Masked storage: ordinary parameters with zeros in place.

The parameter keeps its name, shape and dense gradient; sparsity is a multiplication by 0 or 1 after every step. What is
multiplied are the bits of the weights, read as integers: 0 times anything is then zero, where 0 times an infinite or
undefined float is not. A fused multiplication costs a fifteenth of filling in by bool masks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dst.sharding import local
from dst.topology import Rewiring

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Multipliers:
    """0/1 integers of the parameters' width and layout, for the parameters that are not wholly active."""

    def __init__(self) -> None:
        self._tensors: dict[nn.Parameter, Tensor] = {}

    def set(self, parameter: nn.Parameter, mask: Tensor) -> None:
        """Take over a new mask (bool, of the shape of the parameter's local part) for a parameter."""
        if bool(mask.all()):
            self._tensors.pop(parameter, None)
        else:
            # empty_like keeps the parameter's strides, without which the fused multiplication falls back to a loop.
            self._tensors[parameter] = _bits(torch.empty_like(local(parameter.detach()))).copy_(mask)

    def rewire(self, parameter: nn.Parameter, rewiring: Rewiring) -> None:
        """Follow a topology update; positions are those of the local part."""
        if parameter in self._tensors:
            rewiring.apply_(self._tensors[parameter])

    @torch.no_grad()
    def mask_weights(self, parameters: Iterable[nn.Parameter]) -> None:
        """Set the inactive weights of ``parameters`` to zero, in place."""
        chosen = [p for p in parameters if p in self._tensors]
        self._multiply([local(p.detach()) for p in chosen], chosen)

    @torch.no_grad()
    def mask_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Set the gradients of inactive weights to zero, in place; parameters without one are passed over."""
        chosen = [p for p in parameters if p in self._tensors and p.grad is not None]
        self._multiply([local(p.grad) for p in chosen if p.grad is not None], chosen)

    def _multiply(self, targets: list[Tensor], parameters: list[nn.Parameter]) -> None:
        if not targets:
            return
        for parameter in parameters:
            multiplier = self._tensors[parameter]
            if multiplier.device != parameter.device or multiplier.itemsize != parameter.itemsize:
                self._tensors[parameter] = _bits(torch.empty_like(local(parameter.detach()))).copy_(multiplier)
        torch._foreach_mul_([_bits(t) for t in targets], [self._tensors[p] for p in parameters])


def _bits(tensor: Tensor) -> Tensor:
    """The same memory, read as integers."""
    return tensor.view(_INTEGERS[tensor.itemsize])
