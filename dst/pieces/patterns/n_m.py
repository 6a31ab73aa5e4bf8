"""N:M patterns: N active weights in every window of M."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction as Ratio
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.pieces.patterns.grouped import (
    Grouped,
    channels,
    without_lowest,
)
from dst.topology.layers import SparseLayer
from dst.topology.rewiring import Rewiring
from dst.topology.selection import tie_key, tie_order

_LARGEST_WINDOW = 64
_TILES_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class NM(Grouped):
    """At most ``n`` of every ``m`` consecutive inputs of an output are active (N:M sparsity).

    Inputs are channels: in a convolution, windows run over the input channels at one kernel position. A last window with
    fewer than ``m`` inputs gets its share, rounded down. The density of every layer is n / m. Without ``n`` and ``m``, they
    follow from the method's density: the smallest ``m`` up to 64 that has it exactly (0.5 is 1:2, 0.1 is 1:10).

    Attributes:
        n: Active weights per window, in [1, m]; ``None`` to derive it from the density.
        m: Length of a window, >= 2; ``None`` to derive it from the density.

    Raises:
        ConfigurationError: A number is out of range, or ``n`` is given without ``m``.
    """

    is_free: ClassVar[bool] = False

    n: int | None = None
    m: int | None = None

    def __post_init__(self) -> None:
        if self.n is not None and self.m is None:
            raise ConfigurationError(f"n={self.n} needs m, the length of the windows")
        if self.m is not None and (self.m < 2 or (self.n is not None and not 1 <= self.n <= self.m)):
            raise ConfigurationError(f"{self.n}:{self.m} sparsity: n must lie in [1, m], and m be at least 2")

    def numbers(self, density: float) -> tuple[int, int]:
        """Return ``n`` and ``m`` for a density in (0, 1].

        Raises:
            ConfigurationError: The density is not n / m.
        """
        exact = Ratio(repr(float(density)))
        sizes = [self.m] if self.m is not None else range(2, _LARGEST_WINDOW + 1)
        for m in sizes:
            n = exact * m
            if n.denominator == 1 and n >= 1 and self.n in (None, int(n)):
                return int(n), m
        if self.n is not None and self.m is not None:
            raise ConfigurationError(
                f"{self.n}:{self.m} keeps {self.n / self.m:g} of the weights, and density={density:g}: pass "
                f"density={self.n / self.m:g}, or other numbers"
            )
        limit = f"windows of {self.m}" if self.m is not None else f"windows of up to {_LARGEST_WINDOW}"
        raise ConfigurationError(f"density={density:g} is no N:M sparsity with {limit}; choose a fraction such as 0.25")

    def for_density(self, density: float) -> NM:
        """Return the pattern with both numbers set.

        Raises:
            ConfigurationError: The density is not n / m.
        """
        return NM(*self.numbers(density))

    @property
    def _window(self) -> tuple[int, int]:
        if self.n is None or self.m is None:
            raise ValueError("n and m are not set; call for_density first")
        return self.n, self.m

    def unsupported_reason(self, layer: SparseLayer) -> str | None:
        """See ``Pattern``."""
        (n, m), inputs = self._window, channels(layer)
        return f"{inputs} inputs make no window of {m}" if inputs * n // m < 1 else None

    def fit(self, layer: SparseLayer, count: int) -> int:
        """See ``Pattern``: the only number of active weights that the pattern allows, whatever ``count``."""
        (n, m), inputs = self._window, channels(layer)
        whole, rest = divmod(inputs, m)
        return layer.weights // inputs * (whole * n + rest * n // m)

    def arrange(self, layer: SparseLayer, tensor: Tensor, absent: float = 0) -> Tensor:
        """See ``Grouped``."""
        _, m = self._window
        rows = tensor.movedim(layer.output_dim, 0).movedim(1, -1)
        padding = -rows.shape[-1] % m
        if padding:
            rows = torch.nn.functional.pad(rows, (0, padding), value=absent)
        return rows.reshape(-1, m, 1)

    def _exists(self, layer: SparseLayer, table: Tensor) -> Tensor:
        (_, m), inputs = self._window, channels(layer)
        padded = torch.arange(inputs + -inputs % m, device=table.device) < inputs
        return padded.view(-1, m).repeat(layer.weights // inputs, 1)

    def _quotas(self, layer: SparseLayer, count: int, exists: Tensor) -> Tensor:
        n, m = self._window
        return exists.sum(1) * n // m


@dataclass(frozen=True)
class TransposableNM(Grouped):
    """``n`` of every ``m`` weights along inputs *and* along outputs, so that the backward pass is N:M sparse too.

    Each m×m tile has n active weights in every row and column (Hubara et al. 2021, arXiv:2102.08124). The mask of a tile is
    the best of all permitted ones, 90 for 2:4: an exact search.

    Attributes:
        n: Active weights per row and column of a tile, in [1, m].
        m: Side of a tile, in [2, 4].

    Raises:
        ConfigurationError: A number is out of range.
    """

    is_free: ClassVar[bool] = False

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 2 <= self.m <= 4 or not 1 <= self.n <= self.m:
            raise ConfigurationError(f"transposable {self.n}:{self.m}: m must be 2, 3 or 4, and n lie in [1, m]")

    def for_density(self, density: float) -> TransposableNM:
        """Return the pattern itself.

        Raises:
            ConfigurationError: The density is neither n / m nor 1.
        """
        if density != 1 and abs(density - self.n / self.m) > 1e-9:
            raise ConfigurationError(
                f"transposable {self.n}:{self.m} keeps {self.n / self.m:g} of the weights: pass density={self.n / self.m:g}"
            )
        return self

    def unsupported_reason(self, layer: SparseLayer) -> str | None:
        """See ``Pattern``."""
        sides = (layer.shape[layer.output_dim], channels(layer))
        return f"{sides[0]}×{sides[1]} has no tiles of {self.m}×{self.m}" if any(s % self.m for s in sides) else None

    def fit(self, layer: SparseLayer, count: int) -> int:
        """See ``Pattern``."""
        return layer.weights // self.m * self.n

    def arrange(self, layer: SparseLayer, tensor: Tensor, absent: float = 0) -> Tensor:
        """See ``Grouped``."""
        planes = tensor.movedim(layer.output_dim, 0).flatten(2) if tensor.ndim > 2 else tensor.unsqueeze(2)
        tiles = planes.permute(2, 0, 1).unfold(1, self.m, self.m).unfold(2, self.m, self.m)
        return tiles.reshape(-1, self.m * self.m, 1)

    def holds(self, layer: SparseLayer, mask: Tensor) -> bool:
        """See ``Grouped``."""
        tiles = self.arrange(layer, mask).reshape(-1, self.m, self.m)
        return all(bool((tiles.sum(side) == self.n).all()) for side in (1, 2))

    def select(self, layer: SparseLayer, scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """See ``Grouped``: in every tile the mask with the largest sum of scores."""
        return self._positions(layer, self._best_tiles(self._means(layer, scores), generator))[0]

    def _best_tiles(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """The permitted mask with the largest sum of values (``[tiles, m · m]``), bool; ties at random."""
        permitted = torch.tensor(_tile_masks(self.n, self.m), dtype=values.dtype, device=values.device)
        key, chosen = tie_key(generator), []
        for first in range(0, values.shape[0], _TILES_AT_ONCE):
            sums = values[first : first + _TILES_AT_ONCE] @ permitted.t()
            highest, best = sums.max(1)
            equal = sums == highest[:, None]
            several = (equal.sum(1) > 1).nonzero().squeeze(1)
            if several.numel():
                ids = (several + first)[:, None] * len(permitted) + torch.arange(len(permitted), device=values.device)
                order = tie_order(ids, key).masked_fill(~equal[several], torch.iinfo(torch.int64).max)
                best[several] = order.argmin(1)
            chosen.append(permitted[best].bool())
        return torch.cat(chosen)

    def rewire(
        self,
        layer: SparseLayer,
        mask: Tensor,
        drop_scores: Tensor,
        grow_scores: Tensor | None,
        drop: int,
        grow: int,
        *,
        regrow_dropped: bool,
        generator: torch.Generator,
    ) -> Rewiring:
        """See ``Grouped``.

        Dropping and growing are one choice: the permitted mask with the most weights that the drop score keeps, and among
        those the one with the highest sum of grow scores.
        """
        active = self.arrange(layer, mask)[:, :, 0]
        lows = self._means(layer, drop_scores)
        highs = lows if grow_scores is None else self._means(layer, grow_scores)
        kept = without_lowest(active, lows, drop, generator)
        low, high = highs.amin(1, keepdim=True), highs.amax(1, keepdim=True)
        # A tile's grow scores sum to at most 1. A kept weight outweighs them, and so does the penalty of a dropped one.
        scaled = (highs - low) / (high - low).clamp(min=torch.finfo(highs.dtype).tiny) / (self.m * self.m)
        value = scaled + kept * 2.0 * (self.m * self.m)
        if not regrow_dropped:
            value = value - (active & ~kept) * 1.0
        chosen = self._best_tiles(value, generator)
        return Rewiring(*self._positions(layer, chosen & ~active, active & ~chosen))


@lru_cache
def _tile_masks(n: int, m: int) -> tuple[tuple[int, ...], ...]:
    """All flattened m×m masks with n ones in every row and column."""
    rows = [tuple(int(i in ones) for i in range(m)) for ones in itertools.combinations(range(m), n)]
    tiles = itertools.product(rows, repeat=m)
    return tuple(tuple(itertools.chain(*tile)) for tile in tiles if all(sum(c) == n for c in zip(*tile, strict=True)))
