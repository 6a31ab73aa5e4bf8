"""Changing which weights of a sparse layer are active: a new pattern, and growth by the collected dense gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dst.kernels import Pattern, engine
from dst.nn.gradient_collector import largest_gradients
from dst.nn.passes import COMPUTED

if TYPE_CHECKING:
    from dst.nn.sparse_linear import SparseLinear


def remap(entries: Tensor, source: Tensor, grown: Tensor | None = None) -> Tensor:
    """Convert per-weight entries to a new pattern.

    Args:
        entries: Values, gradient or optimizer state, ``[old nnz]``.
        source: The return value of `SparseLinear.set_pattern`, ``[new nnz]``.
        grown: The entries of newly grown weights, ``[new nnz]``; zero by default.

    Returns:
        ``[new nnz]``: the old entries, and those of ``grown`` at newly grown weights.
    """
    return engine().remap(entries, source, grown)


def adopt(layer: SparseLinear, pattern: Pattern, source: Tensor) -> Tensor:
    """Give ``layer`` another pattern and remap its values; see `SparseLinear.set_pattern`. Returns ``source``."""
    layer._set_pattern(pattern)
    layer.values.grad = None
    layer.values.data = remap(layer.values.data, source)
    return source


def collected_gradient(layer: SparseLinear) -> Tensor:
    """Return the collected gradient at the non-zeros of the current pattern; see `SparseLinear.collected_gradient`."""
    values = layer.values.detach()
    values = values if values.dtype in COMPUTED else values.float()
    total, operators = torch.zeros_like(values), layer._operators()
    for pair in layer.collected:
        x, g = layer._pair(*pair)
        total += operators.gradients(g, x.to(values.dtype), values)[1]
    return total.to(layer.values.dtype)


def gradient_tiles(layer: SparseLinear, rows: int, within: tuple[int, int] | None) -> Iterator[tuple[int, Tensor]]:
    """Yield tiles of the collected dense gradient; see `SparseLinear.gradient_tiles`."""
    dtype = layer.values.dtype if layer.values.dtype in COMPUTED else torch.float32
    height, width = layer._matrix_shape
    start, stop = within or (0, height)

    def product(x: Tensor, g: Tensor, first: int, last: int, tile: Tensor, add: bool) -> None:
        layer._product(x, g, start + first, start + last, tile, add)

    return layer._collector.tiles((stop - start, width), dtype, product, rows)


def grow_candidates(
    layer: SparseLinear,
    k: int,
    exclude: Tensor | None,
    reduce: Callable[[Tensor], None] | None,
    key: int,
    within: tuple[int, int] | None,
) -> Tensor:
    """Return the k positions with the largest absolute gradient; see `SparseLinear.grow_candidates`."""
    exclude = layer.positions() if exclude is None else exclude.contiguous()
    height, width = layer._matrix_shape
    start, stop = within or (0, height)
    tiles, shape = layer.gradient_tiles(within=within), (stop - start, width)
    return largest_gradients(k, tiles, shape, exclude, layer._engine, reduce=reduce, key=key)
