"""The dense gradient of a sparse layer's weight, for gradient-based growth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dst.errors import ConfigurationError
from dst.kernels import Engine

TILE_ROWS = 256

Product: TypeAlias = Callable[[Tensor, Tensor, int, int, Tensor, bool], None]
"""Input, output gradient, first and last row of a tile, the tile, and whether to add to it."""


class GradientCollector:
    """Keeps the inputs and output gradients of backward passes. Their products are the dense gradient.

    The dense gradient is computed in tiles and never materialized. It is the sum over the backward passes since `start`,
    or since the gradient of the values was last set to None.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] | None = None
        self._earlier = 0  # pairs of finished backward passes
        self._hook: RemovableHandle | None = None

    @property
    def active(self) -> bool:
        """Whether pairs are being collected."""
        return self._pairs is not None

    @property
    def pairs(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Inputs and output gradients in the order of the passes, as the layer stores them."""
        return self._pairs or ()

    def start(self, values: nn.Parameter) -> None:
        """Discard earlier pairs and start collecting.

        Args:
            values: The parameter whose gradient the pairs belong to. Pairs are discarded when it is None.
        """
        self._pairs, self._earlier = [], 0
        if self._hook is None:
            self._hook = values.register_hook(lambda gradient: self._end_of_backward(values))

    def stop(self) -> None:
        """Discard the pairs and stop collecting."""
        self._pairs, self._earlier = None, 0
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def add(self, x: Tensor, g: Tensor) -> None:
        """Add the pair of one backward pass through the layer, if collecting."""
        if self._pairs is not None:
            self._pairs.append((x.detach(), g.detach()))

    def restore(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Continue from saved `pairs`, if collecting."""
        if self._pairs is not None:
            self._pairs, self._earlier = list(pairs), len(pairs)

    def _end_of_backward(self, values: nn.Parameter) -> None:
        # Called once per backward pass, before `values.grad` accumulates. If it is None, the gradients of earlier passes
        # were discarded, so their pairs are discarded too.
        if self._pairs is not None:
            if values.grad is None:
                del self._pairs[: self._earlier]
            self._earlier = len(self._pairs)

    def tiles(
        self, shape: tuple[int, int], dtype: torch.dtype, product: Product, rows: int = TILE_ROWS
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield ``(first row, tile)`` of the dense gradient, tile ``[<= rows, in]``. All tiles share one buffer.

        Args:
            shape: ``(out, in)`` of the weight.
            dtype: float32 or float64.
            product: Computes a tile from one pair.
            rows: Rows per tile.

        Raises:
            ConfigurationError: The collector was not started.
        """
        if self._pairs is None:
            raise ConfigurationError(
                "no gradient was collected: call collect_dense_gradient(True) before the forward and backward pass"
            )
        outputs, inputs = shape
        buffer = torch.zeros(min(rows, outputs), inputs, dtype=dtype)
        for first in range(0, outputs, rows):
            last = min(first + rows, outputs)
            tile = buffer[: last - first]
            for i, (x, g) in enumerate(self._pairs):
                product(x, g, first, last, tile, i > 0)
            yield first, tile


@torch.no_grad()
def largest_gradients(
    k: int,
    tiles: Iterator[tuple[int, Tensor]],
    shape: tuple[int, int],
    exclude: Tensor,
    engine: Engine,
    *,
    reduce: Callable[[Tensor], None] | None,
    key: int,
) -> Tensor:
    """Return the k positions with the largest absolute gradient.

    Args:
        k: Number of positions.
        tiles: The dense gradient in tiles of ``TILE_ROWS`` rows. The tiles are overwritten.
        shape: ``(out, in)`` of the weight.
        exclude: Sorted row-major flat indices that may not be chosen, int64.
        engine: Keeps the running top-k.
        reduce: Called on every tile, to average it over ranks in place.
        key: Key of `dst.topology.selection.tie_order`, which breaks ties.

    Returns:
        Sorted row-major flat indices, int64 ``[k]``.

    Raises:
        ConfigurationError: Fewer than k positions are not excluded or have a gradient other than NaN.
    """
    outputs, inputs = shape
    edges = torch.arange(0, outputs + TILE_ROWS, TILE_ROWS).clamp_(max=outputs)
    cuts = torch.searchsorted(exclude, edges * inputs).tolist()
    free = inputs * outputs - exclude.numel()
    if k > free:
        raise ConfigurationError(f"cannot grow {k} connections: only {free} positions are not excluded")
    best = None
    for i, (first, tile) in enumerate(tiles):
        if reduce is not None:
            reduce(tile)
        best = best or engine.top_k(k, tile.dtype, key)
        best.update(tile, first * inputs, exclude[cuts[i] : cuts[i + 1]])
    chosen = torch.empty(0, dtype=torch.int64) if best is None else best.finish()
    if chosen.numel() != k:
        raise ConfigurationError(f"cannot grow {k} connections: the gradient is NaN at all but {chosen.numel()}")
    return chosen
