"""Detecting changes of parameters, to invalidate copies and chains made from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn

from dst.kernels import CompiledChain, CompiledLayer, ConvPlanes


class CopyKey:
    """Identifies the values that were copied.

    Attributes:
        source: An alias of the values. It keeps their address from being reused.
        address: Address of the values.
        version: Autograd's version counter of the values.
        valid: False once the copy is marked as outdated.
    """

    __slots__ = ("address", "source", "valid", "version")

    def __init__(self, values: Tensor):
        self.source, self.address, self.version, self.valid = values.detach(), values.data_ptr(), values._version, True


Watched: TypeAlias = tuple[Mapping[str, Tensor | None], str, int | None, CopyKey | None]
"""The parameters of a module, the name of one, its address or None, and the key of its copy, if any."""


def watch(module: nn.Module, name: str, key: CopyKey | None = None) -> Watched:
    """Record the address of a parameter for `unchanged`. ``key`` also records which values were copied."""
    held = module._parameters[name]
    return module._parameters, name, None if held is None else held.data_ptr(), key


def unchanged(watched: Iterable[Watched]) -> bool:
    """Whether all parameters have the recorded addresses, and copied ones the recorded values."""
    for parameters, name, address, key in watched:
        held = parameters[name]
        if held is None or address is None:
            if held is not address:
                return False
        elif held.data_ptr() != address or (key is not None and not (key.valid and held._version == key.version)):
            return False
    return True


class WatchedChain(NamedTuple):
    """A chain of layers prepared for the kernels. A single object, so that threads replace it atomically.

    Attributes:
        chain: Computes the chain in one call.
        watched: The parameters that the chain reads.
    """

    chain: CompiledChain
    watched: list[Watched]


class WatchedLayer(NamedTuple):
    """A layer prepared for the kernels.

    Attributes:
        compiled: Computes the layer.
        watched: The parameters that it reads.
    """

    compiled: CompiledLayer | ConvPlanes
    watched: list[Watched]


def readable(tensor: Tensor | None, shape: tuple[int, ...]) -> bool:
    """Whether the kernels can read ``tensor`` in place: on the CPU, contiguous, with this shape."""
    return type(tensor) in (Tensor, nn.Parameter) and bool(
        tensor is not None and tensor.is_cpu and tensor.shape == shape and tensor.is_contiguous()
    )
