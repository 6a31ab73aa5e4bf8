"""Which weights share one bit (a *group*), and within which window a budget holds (a *scope*).

One rule serves them all. A pattern lays a layer's weights out as a table ``[scopes, groups, elements]`` of positions; a
group's score is the mean of its elements'; a first mask takes the best groups of every scope, and an update drops the
lowest groups of the layer and lets every scope grow back to its quota.

| pattern | scope | group |
|---|---|---|
| ``Unstructured`` | layer | one weight |
| ``Block`` | layer | a tile of the weight matrix |
| ``Neuron`` | layer | all inputs of one output (neuron or channel) |
| ``Head`` | layer | the rows (or columns) of one attention head |
| ``Diagonal`` | layer | a wrapped diagonal |
| ``FanIn`` | output row | one weight |
| ``NM`` | M consecutive inputs | one weight |
| ``TransposableNM`` | an M×M tile | one weight, N in every row and column |

The network-wide scope is not a pattern but an allocation, ``dst.allocation.Global``: it splits the budget by the scores of
all layers, and combines with every pattern.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction as Ratio
from functools import lru_cache

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.layers import SparseLayer
from dst.topology import Rewiring, best_free, rewire, top_indices

_LARGEST_WINDOW = 64


@dataclass(frozen=True)
class Unstructured:
    """Every weight for itself, one budget per layer."""

    @property
    def is_grouped(self) -> bool:
        """Never."""
        return False

    @property
    def is_free(self) -> bool:
        """Always."""
        return True

    def spread(self, layer: SparseLayer, scores: Tensor) -> Tensor:
        """The scores themselves."""
        return scores

    def select(self, layer: SparseLayer, scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Sorted positions of the best ``count`` weights."""
        return top_indices(scores.reshape(-1), count, generator)

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
        """As ``dst.topology.rewire``."""
        active = mask.reshape(-1).nonzero().squeeze(1)

        def choose(count: int, barred: Tensor) -> Tensor:
            return barred[:0] if grow_scores is None else best_free(grow_scores, count, barred, generator)

        return rewire(
            active,
            drop_scores.take(active),
            mask.numel(),
            drop,
            grow,
            choose,
            regrow_dropped=regrow_dropped,
            generator=generator,
        )

    def for_density(self, density: float) -> Unstructured:
        """The pattern with what depends on the network's density resolved: itself."""
        return self

    def obstacle(self, layer: SparseLayer) -> str | None:
        """Why the layer cannot have the pattern (it stays dense then), or ``None``."""
        return None

    def fit(self, layer: SparseLayer, count: int) -> int:
        """The number of active weights that comes nearest to ``count`` and the pattern can hold."""
        return count


class _Grouped:
    """Top-k over (scope, group), for patterns that say where their groups lie."""

    @property
    def is_grouped(self) -> bool:
        """Always."""
        return True

    @property
    def is_free(self) -> bool:
        """Whether layers may have any density."""
        return True

    def spread(self, layer: SparseLayer, scores: Tensor) -> Tensor:
        """Every weight's score replaced by the mean of its group's."""
        index = self.index(layer).to(scores.device)
        means = _group_means(scores, index)[:, :, None].expand(index.shape)
        there = index >= 0
        return torch.zeros(layer.shape, dtype=means.dtype, device=means.device).put_(index[there], means[there])

    def index(self, layer: SparseLayer) -> Tensor:
        """Row-major positions in the layer, int64 ``[scopes, groups, elements]``; -1 where a scope has fewer groups."""
        raise NotImplementedError

    def for_density(self, density: float) -> _Grouped:
        """The pattern with what depends on the network's density resolved."""
        return self

    def obstacle(self, layer: SparseLayer) -> str | None:
        """Why the layer cannot have the pattern (it stays dense then), or ``None``."""
        return None

    def fit(self, layer: SparseLayer, count: int) -> int:
        """The number of active weights that comes nearest to ``count`` and the pattern can hold, at least one group."""
        elements = self._elements(layer)
        return min(layer.weights // elements, max(1, round(count / elements))) * elements

    def _elements(self, layer: SparseLayer) -> int:
        return self.index(layer).shape[2]

    def quotas(self, layer: SparseLayer, count: int, scopes: Tensor) -> Tensor:
        """Active groups per scope, int64 ``[scopes]``, for ``count`` active weights.

        Args:
            layer: The layer.
            count: A number that ``fit`` returned.
            scopes: Bool ``[scopes, groups]``: where there are groups.
        """
        return torch.full((scopes.shape[0],), count // self._elements(layer) // scopes.shape[0], dtype=torch.int64)

    def select(self, layer: SparseLayer, scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """The best groups of every scope.

        Args:
            layer: The layer.
            scores: Float, of the layer's shape.
            count: A number that ``fit`` returned.
            generator: CPU generator that breaks ties.

        Returns:
            Sorted row-major positions, int64, on the scores' device.
        """
        index = self.index(layer).to(scores.device)
        exists = index[:, :, 0] >= 0
        means = _group_means(scores, index)
        chosen = _best_per_scope(means, self.quotas(layer, count, exists.cpu()).to(scores.device), exists, generator)
        return index[chosen].reshape(-1).sort().values

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
        """Drop the lowest groups of the layer, then let every scope grow to its quota.

        A scope that keeps more than its quota (after the quota shrank) loses its lowest. Where a scope cannot be filled
        otherwise, groups dropped just now return even if ``regrow_dropped`` is off.

        Args:
            layer: The layer.
            mask: Bool, the current mask, of the layer's shape, which has the pattern.
            drop_scores: Float, same shape: low groups are dropped.
            grow_scores: Float, same shape: high groups are grown; ``None`` where nothing is to grow.
            drop: Weights to drop; groups are whole, so as many as fit.
            grow: Weights to grow; with ``drop`` it says how many are active afterwards.
            regrow_dropped: Whether groups dropped just now are candidates.
            generator: CPU generator that breaks ties.

        Returns:
            The rewiring, in positions of single weights.
        """
        index = self.index(layer).to(mask.device)
        exists = index[:, :, 0] >= 0
        active = mask.reshape(-1)[index[:, :, 0].clamp(min=0)] & exists
        target = int(mask.sum()) - drop + grow
        lows = _group_means(drop_scores, index)
        highs = torch.zeros_like(lows) if grow_scores is None else _group_means(grow_scores, index)
        positions = active.reshape(-1).nonzero().squeeze(1)
        dropped_groups = min(positions.numel(), drop // index.shape[2])
        kept = torch.zeros_like(active)
        best = top_indices(lows.reshape(-1)[positions], positions.numel() - dropped_groups, generator)
        kept.view(-1)[positions[best]] = True
        quotas = self._quotas_after(layer, target, exists, kept, highs, active)
        candidates = exists if regrow_dropped else exists & ~active
        # Kept groups come first, best drop score first; then candidates by growth score; then what was just dropped.
        rank = torch.where(kept, 2, torch.where(candidates, 1, 0))
        value = torch.where(kept, lows, highs)
        chosen = _best_per_scope(value, quotas.to(mask.device), exists, generator, rank)
        return Rewiring(
            index[chosen & ~active].reshape(-1).sort().values, index[active & ~chosen].reshape(-1).sort().values
        )

    def _quotas_after(
        self, layer: SparseLayer, target: int, exists: Tensor, kept: Tensor, highs: Tensor, active: Tensor
    ) -> Tensor:
        return self.quotas(layer, target, exists.cpu())


def _group_means(scores: Tensor, index: Tensor) -> Tensor:
    """Mean of each group's scores, float32 or wider ``[scopes, groups]``; lowest for NaN."""
    values = scores.reshape(-1)[index.clamp(min=0)]
    values = values.to(torch.promote_types(values.dtype, torch.float32)).mean(2)
    return values.nan_to_num(nan=torch.finfo(values.dtype).min)


def _best_per_scope(
    values: Tensor, quotas: Tensor, exists: Tensor, generator: torch.Generator, rank: Tensor | None = None
) -> Tensor:
    """Bool ``[scopes, groups]``: per scope the ``quotas`` groups with the highest (rank, value), ties at random."""
    scopes, groups = values.shape
    if scopes == 1:
        return _best(values[0], int(quotas[0]), exists[0], generator, None if rank is None else rank[0])[None]
    # A random order first: the stable sorts after it leave it standing among equals.
    shuffle = torch.rand(values.shape, generator=generator).argsort(1).to(values.device)
    order = shuffle.gather(1, values.gather(1, shuffle).argsort(dim=1, descending=True, stable=True))
    level = exists.to(torch.int64) if rank is None else (rank + 1) * exists
    order = order.gather(1, level.gather(1, order).argsort(dim=1, descending=True, stable=True))
    chosen = torch.zeros_like(exists)
    chosen.scatter_(1, order, torch.arange(groups, device=values.device)[None] < quotas[:, None])
    return chosen & exists


def _best(values: Tensor, count: int, exists: Tensor, generator: torch.Generator, rank: Tensor | None) -> Tensor:
    """One scope of ``_best_per_scope``."""
    chosen = torch.zeros_like(exists)
    for level in (None,) if rank is None else (2, 1, 0):
        among = (exists if level is None or rank is None else exists & (rank == level)).nonzero().squeeze(1)
        taken = min(count, among.numel())
        chosen[among[top_indices(values[among], taken, generator)]] = True
        count -= taken
    return chosen


def _matrix(layer: SparseLayer) -> Tensor:
    """Positions as ``[outputs, inputs · kernel]``, int64."""
    table = torch.arange(layer.weights).view(layer.shape).movedim(layer.output_dim, 0)
    return table.reshape(table.shape[0], -1)


@dataclass(frozen=True)
class Block(_Grouped):
    """Tiles of ``height`` outputs by ``width`` inputs live or die together.

    A side that the tile does not divide is tiled by the greatest common divisor of the two: a layer of 10 outputs has
    tiles of 2 where 4 were asked for. Inputs of a convolution are (channel, kernel row, kernel column).

    Attributes:
        height: Outputs of a tile.
        width: Inputs of a tile.
    """

    height: int = 4
    width: int = 4

    def __post_init__(self) -> None:
        _check_positive(height=self.height, width=self.width)

    def index(self, layer: SparseLayer) -> Tensor:
        """See ``_Grouped``."""
        return _tiles(_matrix(layer), self.height, self.width)


def _tiles(matrix: Tensor, height: int, width: int) -> Tensor:
    rows, columns = matrix.shape
    height, width = math.gcd(height, rows), math.gcd(width, columns)
    tiles = matrix.view(rows // height, height, columns // width, width).transpose(1, 2)
    return tiles.reshape(1, -1, height * width)


@dataclass(frozen=True)
class Neuron(_Grouped):
    """All inputs of an output live or die together: neurons of a linear layer, output channels of a convolution."""

    def index(self, layer: SparseLayer) -> Tensor:
        """See ``_Grouped``."""
        return _matrix(layer)[None]


@dataclass(frozen=True)
class Head(_Grouped):
    """The part of one attention head in a projection lives or dies as a whole.

    In query, key and value projections a head is a range of outputs, in the output projection a range of inputs. Heads are
    chosen in every projection for itself. All other layers stay dense.

    Attributes:
        heads: Number of heads; it divides the width.
        rows: Names or patterns of the layers in which heads are ranges of outputs.
        columns: Names or patterns of the layers in which they are ranges of inputs.
    """

    heads: int = 4
    rows: Sequence[str] = ("*in_proj*", "*q_proj*", "*k_proj*", "*v_proj*", "*query*", "*key*", "*value*", "*qkv*")
    columns: Sequence[str] = ("*out_proj*", "*attention.output*", "*attention.out*")

    def __post_init__(self) -> None:
        _check_positive(heads=self.heads)
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "columns", tuple(self.columns))

    def obstacle(self, layer: SparseLayer) -> str | None:
        """See ``Unstructured``."""
        outputs, inputs = _matrix_shape(layer)
        if self._is(layer, self.columns):
            size = inputs
        elif self._is(layer, self.rows):
            size = outputs
        else:
            return "no attention projection"
        return f"{self.heads} heads do not divide {size}" if size % self.heads else None

    def _is(self, layer: SparseLayer, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, p) for name in (layer.label, layer.parameter) for p in patterns)

    def index(self, layer: SparseLayer) -> Tensor:
        """See ``_Grouped``."""
        matrix = _matrix(layer)
        if self._is(layer, self.columns):
            matrix = matrix.t()
        return matrix.reshape(1, self.heads, -1)


@dataclass(frozen=True)
class Diagonal(_Grouped):
    """Wrapped diagonals of the weight matrix, each active or not as a whole.

    Diagonal d of a wide matrix holds the positions (i, (i + d) mod inputs), that of a tall one ((j + d) mod outputs, j): as
    many diagonals as the longer side, each as long as the shorter, which together are the whole matrix (the structure of
    DynaDiag; Tyagi et al. 2025, https://arxiv.org/abs/2506.11449).
    """

    def index(self, layer: SparseLayer) -> Tensor:
        """See ``_Grouped``."""
        matrix = _matrix(layer)
        if matrix.shape[0] > matrix.shape[1]:
            matrix = matrix.t()
        short, long = matrix.shape
        i = torch.arange(short)
        return matrix[i[None, :], (i[None, :] + torch.arange(long)[:, None]) % long][None]


@dataclass(frozen=True)
class FanIn(_Grouped):
    """Constant fan-in: every output has the same number of inputs (SRigL; Lasby et al. 2024, arXiv:2305.02299).

    With ``ablate`` > 0, an update removes outputs of little importance: those of whose fan-in less than that share is
    salient, being kept by the drop score or among the layer's best by the grow score. The budget moves to the outputs that
    remain, whose fan-in rises (section 3.2 there).

    Deviation: the fan-in is a whole number, so a layer's count is the product of it and the remaining outputs, at most the
    budget. At least one output stays.

    Attributes:
        ablate: γ_sal, the share of a fan-in, in [0, 1]; 0 keeps all outputs. The authors use 0.3.
    """

    ablate: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.ablate <= 1:
            raise ConfigurationError(f"ablate={self.ablate} must lie in [0, 1]")

    def index(self, layer: SparseLayer) -> Tensor:
        """See ``_Grouped``."""
        return _matrix(layer)[:, :, None]

    def fit(self, layer: SparseLayer, count: int) -> int:
        """See ``Unstructured``: a multiple of the number of outputs."""
        outputs, inputs = _matrix_shape(layer)
        return min(inputs, max(1, round(count / outputs))) * outputs

    def _quotas_after(
        self, layer: SparseLayer, target: int, exists: Tensor, kept: Tensor, highs: Tensor, active: Tensor
    ) -> Tensor:
        inputs = exists.shape[1]
        if self.ablate == 0:
            return self.quotas(layer, target, exists.cpu())
        wanted = highs.masked_fill(kept, -math.inf).reshape(-1)
        salient = kept.reshape(-1).clone()
        salient[wanted.topk(min(max(0, target - int(kept.sum())), wanted.numel())).indices] = True
        per_row = salient.view_as(kept).sum(1)
        fan_in = max(1, target // max(1, int(active.any(1).sum())))
        alive = per_row >= self.ablate * fan_in
        alive &= per_row > 0
        if not alive.any():
            alive[per_row.argmax()] = True
        # All outputs of a layer share the fan-in that its budget gives those which are left.
        quota = min(inputs, max(1, target // int(alive.sum())))
        return alive.to(torch.int64) * quota


@dataclass(frozen=True)
class NM(_Grouped):
    """At most ``n`` of every ``m`` consecutive inputs of an output (N:M sparsity).

    Inputs are channels: in a convolution windows run over the input channels at one kernel position. A last window of
    fewer than ``m`` inputs has its share, rounded down. The density of every layer is n / m; left out, the two numbers
    follow from the method's density, with the smallest ``m`` up to 64 that holds it exactly (0.5 is 1:2, 0.1 is 1:10).

    Attributes:
        n: Active weights of a window.
        m: Length of a window.
    """

    n: int | None = None
    m: int | None = None

    @property
    def is_free(self) -> bool:
        """Never."""
        return False

    def __post_init__(self) -> None:
        if self.n is not None and self.m is None:
            raise ConfigurationError(f"n={self.n} needs m, the length of the windows")
        if self.m is not None and (self.m < 2 or (self.n is not None and not 1 <= self.n <= self.m)):
            raise ConfigurationError(f"{self.n}:{self.m} sparsity: n must lie in [1, m], and m be at least 2")

    def numbers(self, density: float) -> tuple[int, int]:
        """Resolve ``n`` and ``m`` for a density.

        Raises:
            ConfigurationError: A density that is not n / m.
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

    def for_density(self, density: float) -> _Grouped:
        """The pattern with its numbers resolved.

        Raises:
            ConfigurationError: A density that is not n / m.
        """
        return _Windows(*self.numbers(density))


@dataclass(frozen=True)
class _Windows(_Grouped):
    n: int
    m: int

    @property
    def is_free(self) -> bool:
        return False

    def obstacle(self, layer: SparseLayer) -> str | None:
        inputs = _channels(layer)
        return f"{inputs} inputs make no window of {self.m}" if inputs * self.n // self.m < 1 else None

    def fit(self, layer: SparseLayer, count: int) -> int:
        inputs = _channels(layer)
        whole, rest = divmod(inputs, self.m)
        return layer.weights // inputs * (whole * self.n + rest * self.n // self.m)

    def _elements(self, layer: SparseLayer) -> int:
        return 1

    def index(self, layer: SparseLayer) -> Tensor:
        table = torch.arange(layer.weights).view(layer.shape).movedim(layer.output_dim, 0)
        rows = table.movedim(1, -1).reshape(-1, table.shape[1])
        padding = -rows.shape[1] % self.m
        return torch.nn.functional.pad(rows, (0, padding), value=-1).reshape(-1, self.m, 1)

    def quotas(self, layer: SparseLayer, count: int, scopes: Tensor) -> Tensor:
        return scopes.sum(1) * self.n // self.m


@dataclass(frozen=True)
class TransposableNM(_Grouped):
    """``n`` of every ``m`` weights along inputs *and* along outputs, so that the backward pass is N:M sparse too.

    Tiles of m×m have n active weights in every row and column (Hubara et al. 2021, arXiv:2102.08124). The best tile is
    found among all of them, exactly: 90 for 2:4.

    Attributes:
        n: Active weights per row and column of a tile.
        m: Side of a tile, at most 4.
    """

    n: int = 2
    m: int = 4

    @property
    def is_free(self) -> bool:
        """Never."""
        return False

    def __post_init__(self) -> None:
        if not 2 <= self.m <= 4 or not 1 <= self.n <= self.m:
            raise ConfigurationError(f"transposable {self.n}:{self.m}: m must be 2, 3 or 4, and n lie in [1, m]")

    def for_density(self, density: float) -> TransposableNM:
        """The pattern, if the density is n / m (or 1).

        Raises:
            ConfigurationError: Another density.
        """
        if density != 1 and abs(density - self.n / self.m) > 1e-9:
            raise ConfigurationError(
                f"transposable {self.n}:{self.m} keeps {self.n / self.m:g} of the weights: pass density={self.n / self.m:g}"
            )
        return self

    def obstacle(self, layer: SparseLayer) -> str | None:
        """See ``Unstructured``."""
        sides = (layer.shape[layer.output_dim], _channels(layer))
        return f"{sides[0]}×{sides[1]} has no tiles of {self.m}×{self.m}" if any(s % self.m for s in sides) else None

    def fit(self, layer: SparseLayer, count: int) -> int:
        """See ``Unstructured``."""
        return layer.weights // self.m * self.n

    def _elements(self, layer: SparseLayer) -> int:
        return 1

    def index(self, layer: SparseLayer) -> Tensor:
        """See ``_Grouped``."""
        table = torch.arange(layer.weights).view(layer.shape).movedim(layer.output_dim, 0)
        planes = table.reshape(table.shape[0], table.shape[1], -1).permute(2, 0, 1)
        tiles = planes.unfold(1, self.m, self.m).unfold(2, self.m, self.m)
        return tiles.reshape(-1, self.m * self.m, 1)

    def select(self, layer: SparseLayer, scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """See ``_Grouped``; the tiles of the largest sum."""
        index = self.index(layer).to(scores.device)
        return index[self._best_tiles(_group_means(scores, index), generator)].reshape(-1).sort().values

    def _best_tiles(self, values: Tensor, generator: torch.Generator) -> Tensor:
        tiles = torch.tensor(_tile_masks(self.n, self.m), dtype=values.dtype, device=values.device)
        tiles = tiles[
            torch.randperm(len(tiles), generator=generator).to(values.device)
        ]  # argmax takes the first of equals
        return tiles[(values @ tiles.t()).argmax(1)].bool()

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
        """See ``_Grouped``.

        Dropping and growing are one choice here: that of the tiles with the most weights which the drop score keeps, and
        among those, of the highest sum of growth scores.
        """
        index = self.index(layer).to(mask.device)
        active = mask.reshape(-1)[index[:, :, 0]]
        lows = _group_means(drop_scores, index)
        highs = torch.zeros_like(lows) if grow_scores is None else _group_means(grow_scores, index)
        positions = active.reshape(-1).nonzero().squeeze(1)
        kept = torch.zeros_like(active)
        best = top_indices(lows.reshape(-1)[positions], max(0, positions.numel() - drop), generator)
        kept.view(-1)[positions[best]] = True
        spread = (highs.amax(1, keepdim=True) - highs.amin(1, keepdim=True)).clamp(min=1e-30)
        value = (highs - highs.amin(1, keepdim=True)) / spread + kept * (self.m * self.m + 1.0)
        if not regrow_dropped:
            value = value - (active & ~kept) * 2.0
        chosen = self._best_tiles(value, generator)
        return Rewiring(
            index[chosen & ~active].reshape(-1).sort().values, index[active & ~chosen].reshape(-1).sort().values
        )


@lru_cache
def _tile_masks(n: int, m: int) -> tuple[tuple[int, ...], ...]:
    """All m×m tiles, flat, with n ones in every row and column."""
    rows = [tuple(int(i in ones) for i in range(m)) for ones in itertools.combinations(range(m), n)]
    tiles = itertools.product(rows, repeat=m)
    return tuple(tuple(itertools.chain(*tile)) for tile in tiles if all(sum(c) == n for c in zip(*tile, strict=True)))


def _matrix_shape(layer: SparseLayer) -> tuple[int, int]:
    outputs = layer.shape[layer.output_dim]
    return outputs, layer.weights // outputs


def _channels(layer: SparseLayer) -> int:
    """Input channels."""
    return next(size for d, size in enumerate(layer.shape) if d != layer.output_dim)


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigurationError(f"{name}={size!r} must be a positive integer")
