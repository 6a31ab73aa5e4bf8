"""Whether parameters are where they were and as they were when something was derived from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn

from dst.kernels import CompiledChain


class CopyKey:
    """Identifies the values that a copy was made from.

    Attributes:
        source: An alias of the values. It keeps their address from being reused.
        address: Address of the values.
        version: Autograd's version of the values.
        valid: False once the owner of the copy knows that it is outdated.
    """

    __slots__ = ("address", "source", "valid", "version")

    def __init__(self, values: Tensor):
        self.source, self.address, self.version, self.valid = values.detach(), values.data_ptr(), values._version, True


Watched: TypeAlias = tuple[Mapping[str, Tensor | None], str, int | None, CopyKey | None]
"""Parameters of a module, the name of one, its address or None, and the key of the copy made of it, if any."""


def watch(module: nn.Module, name: str, key: CopyKey | None = None) -> Watched:
    """Note where a parameter is, for `unchanged`; with ``key``, also which values were copied."""
    held = module._parameters[name]
    return module._parameters, name, None if held is None else held.data_ptr(), key


def unchanged(watched: Iterable[Watched]) -> bool:
    """Whether all parameters are where they were, and the copied ones have the values they had."""
    for parameters, name, address, key in watched:
        held = parameters[name]
        if held is None or address is None:
            if held is not address:
                return False
        elif held.data_ptr() != address or (key is not None and not (key.valid and held._version == key.version)):
            return False
    return True


class WatchedChain(NamedTuple):
    """A chain of layers prepared for the kernels. One object, so that other threads see all of it or nothing.

    Attributes:
        chain: Computes the chain in one call.
        watched: The parameters that it reads.
    """

    chain: CompiledChain
    watched: list[Watched]


def readable(tensor: Tensor | None, shape: tuple[int, ...]) -> bool:
    """Whether the kernels can read ``tensor`` in place: on the CPU, contiguous and of this shape."""
    return type(tensor) in (Tensor, nn.Parameter) and bool(
        tensor is not None and tensor.is_cpu and tensor.shape == shape and tensor.is_contiguous()
    )
