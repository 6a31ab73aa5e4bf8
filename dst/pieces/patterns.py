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

import numpy as np
import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.topology.layers import SparseLayer
from dst.topology.rewiring import Rewiring, rewire
from dst.topology.selection import best_free, tie_key, tie_order, top_indices

_LARGEST_WINDOW = 64
_TILES_AT_ONCE = 1 << 15


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
        """As ``dst.topology.rewiring.rewire``."""
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

    def holds(self, layer: SparseLayer, mask: Tensor) -> bool:
        """Always."""
        return True


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

    def arrange(self, layer: SparseLayer, tensor: Tensor, absent: float = 0) -> Tensor:
        """Lay a tensor of the layer's shape out as the table ``[scopes, groups, elements]``.

        Args:
            layer: The layer.
            tensor: Any dtype.
            absent: What stands where a scope has fewer groups than others.
        """
        raise NotImplementedError

    def _exists(self, layer: SparseLayer, table: Tensor) -> Tensor:
        """Bool ``[scopes, groups]``: where there are groups, on the device of a table."""
        return torch.ones(table.shape[:2], dtype=torch.bool, device=table.device)

    def _positions(self, layer: SparseLayer, *chosen: Tensor) -> list[Tensor]:
        """Sorted row-major positions of chosen groups (each bool ``[scopes, groups]``)."""
        everything = self.arrange(layer, torch.arange(layer.weights, device=chosen[0].device).view(layer.shape), -1)
        return [everything[groups].reshape(-1).sort().values for groups in chosen]

    def spread(self, layer: SparseLayer, scores: Tensor) -> Tensor:
        """Every weight's score replaced by the mean of its group's."""
        means = self._means(layer, scores)
        positions = self.arrange(layer, torch.arange(layer.weights, device=scores.device).view(layer.shape))
        result = torch.empty(layer.shape, dtype=means.dtype, device=means.device)
        return result.put_(positions, means[:, :, None].expand(positions.shape).contiguous())

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
        """Weights of a group."""
        return 1

    def _quotas(self, layer: SparseLayer, count: int, exists: Tensor) -> Tensor:
        """Active groups per scope, int64 ``[scopes]``, for ``count`` active weights (a number that ``fit`` returned)."""
        per_scope = count // self._elements(layer) // exists.shape[0]
        return torch.full((exists.shape[0],), per_scope, dtype=torch.int64, device=exists.device)

    def _quotas_after(
        self,
        layer: SparseLayer,
        target: int,
        exists: Tensor,
        kept: Tensor,
        wanted: Tensor,
        active: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Quotas of an update: ``wanted`` are growth scores, -inf where nothing may grow; all ``[scopes, groups]``."""
        return self._quotas(layer, target, exists)

    def holds(self, layer: SparseLayer, mask: Tensor) -> bool:
        """Whether a mask (bool, of the layer's shape) has the pattern: whole groups, and every scope its quota."""
        table = self.arrange(layer, mask)
        exists, chosen = self._exists(layer, table), table[:, :, 0]
        if bool((table != chosen[:, :, None]).any()):
            return False
        quotas = self._quotas(layer, int(mask.sum()), exists)
        return torch.equal((chosen & exists).sum(1), quotas)

    def _means(self, layer: SparseLayer, scores: Tensor) -> Tensor:
        """Mean of each group's scores, finite, float32 or wider ``[scopes, groups]``; lowest for NaN."""
        values = self.arrange(layer, scores)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        values = values.squeeze(2) if values.shape[2] == 1 else values.mean(2)
        return values.nan_to_num(nan=torch.finfo(values.dtype).min)

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
        means = self._means(layer, scores)
        exists = self._exists(layer, means)
        quotas = self._quotas(layer, count, exists)
        return self._positions(layer, best_per_scope(means.masked_fill(~exists, -math.inf), quotas, generator))[0]

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
            mask: Bool, the current mask, of the layer's shape. Its groups are whole; scopes may miss their quotas.
            drop_scores: Float, same shape: low groups are dropped.
            grow_scores: Float, same shape: high groups are grown; ``None`` for the drop scores.
            drop: Weights to drop; groups are whole, so as many as fit.
            grow: Weights to grow; with ``drop`` it says how many are active afterwards, a number that ``fit`` returns.
            regrow_dropped: Whether groups dropped just now are candidates.
            generator: CPU generator that breaks ties.

        Returns:
            The rewiring, in positions of single weights.
        """
        lows = self._means(layer, drop_scores)
        highs = lows if grow_scores is None else self._means(layer, grow_scores)
        exists = self._exists(layer, lows)
        active = self.arrange(layer, mask)[:, :, 0] & exists
        target = int(mask.sum()) - drop + grow
        kept = _without_lowest(active, lows, drop // self._elements(layer), generator)
        candidates = exists & ~kept if regrow_dropped else exists & ~active
        wanted = highs.masked_fill(~candidates, -math.inf)
        quotas = self._quotas_after(layer, target, exists, kept, wanted, active, generator)
        chosen = best_per_scope(wanted.masked_fill(kept, math.inf), quotas, generator)
        odd = (kept.sum(1) > quotas) | ((kept | candidates).sum(1) < quotas)
        if odd.any():
            # What is kept comes first, by drop score; then candidates by growth score; then what was just dropped.
            rank = kept[odd] * 2 + candidates[odd].long() + exists[odd]
            value = torch.where(kept, lows, highs)[odd]
            chosen[odd] = _best_by_rank(rank, value, quotas[odd], generator) & exists[odd]
        return Rewiring(*self._positions(layer, chosen & ~active, active & ~chosen))


def _without_lowest(active: Tensor, scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``active`` (bool) without its ``count`` lowest scores."""
    positions = active.reshape(-1).nonzero().squeeze(1)
    best = top_indices(scores.reshape(-1)[positions], max(0, positions.numel() - count), generator)
    kept = torch.zeros(active.shape, dtype=torch.bool, device=active.device)  # row-major, whatever the table's strides
    kept.view(-1)[positions[best]] = True
    return kept


def best_per_scope(values: Tensor, quotas: Tensor, generator: torch.Generator) -> Tensor:
    """The highest values of every row, ties at random.

    Args:
        values: Float ``[scopes, groups]``, no NaN.
        quotas: How many of each row, int64 ``[scopes]``, in [0, groups].
        generator: CPU generator that breaks ties.

    Returns:
        Bool ``[scopes, groups]``.
    """
    chosen = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    if values.shape[0] == 1:
        chosen[0, top_indices(values[0], int(quotas[0]), generator)] = True
        return chosen
    key = tie_key(generator)
    for quota in quotas.unique().tolist():
        if quota == 0:
            continue
        rows = (quotas == quota).nonzero().squeeze(1)
        part = values if rows.numel() == values.shape[0] else values[rows]
        threshold = _kth_largest_of_rows(part, quota)
        above, ties = part > threshold, part == threshold
        missing = quota - above.sum(1)
        crowded = (ties.sum(1) > missing).nonzero().squeeze(1)
        if crowded.numel():
            groups = torch.arange(values.shape[1], device=values.device)
            order = tie_order(rows[crowded, None] * values.shape[1] + groups, key)
            order = order.masked_fill(~ties[crowded], torch.iinfo(torch.int64).max)
            last = order.sort(1).values.gather(1, missing[crowded, None] - 1)
            ties[crowded] = order <= last
        chosen[rows] = above | ties
    return chosen


def _kth_largest_of_rows(values: Tensor, count: int) -> Tensor:
    """The ``count``-th largest entry of every row, ``[rows, 1]``."""
    position = values.shape[1] - count
    if values.device.type == "cpu":
        part = np.partition(values.numpy(), position, axis=1)[:, position : position + 1]
        return torch.from_numpy(part)
    return values.kthvalue(position + 1, dim=1, keepdim=True).values


def _best_by_rank(rank: Tensor, values: Tensor, quotas: Tensor, generator: torch.Generator) -> Tensor:
    """As ``best_per_scope``, by rank first and value second."""
    key = tie_key(generator)
    positions = torch.arange(values.numel(), device=values.device).view(values.shape)
    order = tie_order(positions, key).argsort(1)
    for by in (values, rank):  # stable sorts leave the order before them standing among equals
        order = order.gather(1, by.gather(1, order).argsort(dim=1, descending=True, stable=True))
    chosen = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    places = torch.arange(values.shape[1], device=values.device)[None]
    return chosen.scatter_(1, order, places < quotas[:, None])


def _matrix(layer: SparseLayer, tensor: Tensor) -> Tensor:
    """A tensor of the layer's shape as ``[outputs, inputs · kernel]``."""
    tensor = tensor.movedim(layer.output_dim, 0)
    return tensor.reshape(tensor.shape[0], -1)


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

    def arrange(self, layer: SparseLayer, tensor: Tensor, absent: float = 0) -> Tensor:
        """See ``_Grouped``."""
        height, width = self._tile(layer)
        outputs, inputs = _matrix_shape(layer)
        tiles = _matrix(layer, tensor).reshape(outputs // height, height, inputs // width, width).transpose(1, 2)
        return tiles.reshape(1, -1, height * width)

    def _elements(self, layer: SparseLayer) -> int:
        return math.prod(self._tile(layer))

    def _tile(self, layer: SparseLayer) -> tuple[int, int]:
        outputs, inputs = _matrix_shape(layer)
        return math.gcd(self.height, outputs), math.gcd(self.width, inputs)


@dataclass(frozen=True)
class Neuron(_Grouped):
    """All inputs of an output live or die together: neurons of a linear layer, output channels of a convolution."""

    def arrange(self, layer: SparseLayer, tensor: Tensor, absent: float = 0) -> Tensor:
        """See ``_Grouped``."""
        return _matrix(layer, tensor)[None]

    def _elements(self, layer: SparseLayer) -> int:
        return _matrix_shape(layer)[1]


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

    def arrange(self, layer: SparseLayer, tensor: Tensor, absent: float = 0) -> Tensor:
        """See ``_Grouped``."""
        matrix = _matrix(layer, tensor)
        if self._is(layer, self.columns):
            matrix = matrix.t()
        return matrix.reshape(1, self.heads, -1)

    def _elements(self, layer: SparseLayer) -> int:
        return layer.weights // self.heads


@dataclass(frozen=True)
class Diagonal(_Grouped):
    """Wrapped diagonals of the weight matrix, each active or not as a whole.

    Diagonal d of a wide matrix holds the positions (i, (i + d) mod inputs), that of a tall one ((j + d) mod outputs, j): as
    many diagonals as the longer side, each as long as the shorter, which together are the whole matrix (the structure of
    DynaDiag; Tyagi et al. 2025, https://arxiv.org/abs/2506.11449).
    """

    def arrange(self, layer: SparseLayer, tensor: Tensor, absent: float = 0) -> Tensor:
        """See ``_Grouped``."""
        matrix = _matrix(layer, tensor)
        if matrix.shape[0] > matrix.shape[1]:
            matrix = matrix.t()
        short, long = matrix.shape
        # Written twice side by side, no diagonal wraps around.
        twice = torch.cat([matrix, matrix], 1)
        return twice.as_strided((1, long, short), (0, 1, 2 * long + 1))

    def _elements(self, layer: SparseLayer) -> int:
        return min(_matrix_shape(layer))


@dataclass(frozen=True)
class FanIn(_Grouped):
    """Constant fan-in: every output has the same number of inputs (SRigL; Lasby et al. 2024, arXiv:2305.02299).

    With ``ablate`` > 0, an update removes outputs of little importance: those fewer of whose connections than that share
    of the fan-in are salient. Salient are the connections that the drop score keeps, and as many as would make up the
    budget with the best growth scores of the layer. The budget moves to the outputs that remain, whose fan-in rises; an
    output that was removed returns where enough of its connections become salient (section 3.2 there).

    Deviations: the fan-in is a whole number, so a layer's count is the product of it and the remaining outputs, at most
    the budget. At least one output stays, and those that stay have a salient connection. The authors count the best
    growth scores among kept connections too.

    Attributes:
        ablate: γ_sal, the share of a fan-in, in [0, 1]; 0 keeps all outputs. The authors use 0.3 for convolutional
            networks.
    """

    ablate: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.ablate <= 1:
            raise ConfigurationError(f"ablate={self.ablate} must lie in [0, 1]")

    def arrange(self, layer: SparseLayer, tensor: Tensor, absent: float = 0) -> Tensor:
        """See ``_Grouped``."""
        return _matrix(layer, tensor)[:, :, None]

    def fit(self, layer: SparseLayer, count: int) -> int:
        """See ``Unstructured``: a multiple of the number of outputs."""
        outputs, inputs = _matrix_shape(layer)
        return min(inputs, max(1, round(count / outputs))) * outputs

    def holds(self, layer: SparseLayer, mask: Tensor) -> bool:
        """See ``_Grouped``; outputs that were removed have no inputs."""
        per_output = _matrix(layer, mask).sum(1)
        alive = per_output[per_output > 0] if self.ablate else per_output
        return alive.numel() > 0 and bool((alive == alive[0]).all())

    def _quotas_after(
        self,
        layer: SparseLayer,
        target: int,
        exists: Tensor,
        kept: Tensor,
        wanted: Tensor,
        active: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        if self.ablate == 0:
            return self._quotas(layer, target, exists)
        salient = kept.clone()
        room = min(max(0, target - int(kept.sum())), int((wanted > -math.inf).sum()))
        salient.view(-1)[top_indices(wanted.reshape(-1), room, generator)] = True
        per_row = salient.sum(1)
        fan_in = target / max(1, int(active.any(1).sum()))
        alive = per_row >= max(1, math.ceil(self.ablate * fan_in))
        if not alive.any():
            alive[per_row.argmax()] = True
        # All outputs of a layer share the fan-in that its budget gives those which are left.
        quota = min(exists.shape[1], max(1, target // int(alive.sum())))
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

    def arrange(self, layer: SparseLayer, tensor: Tensor, absent: float = 0) -> Tensor:
        rows = tensor.movedim(layer.output_dim, 0).movedim(1, -1)
        padding = -rows.shape[-1] % self.m
        if padding:
            rows = torch.nn.functional.pad(rows, (0, padding), value=absent)
        return rows.reshape(-1, self.m, 1)

    def _exists(self, layer: SparseLayer, table: Tensor) -> Tensor:
        inputs = _channels(layer)
        padded = torch.arange(inputs + -inputs % self.m, device=table.device) < inputs
        return padded.view(-1, self.m).repeat(layer.weights // inputs, 1)

    def _quotas(self, layer: SparseLayer, count: int, exists: Tensor) -> Tensor:
        return exists.sum(1) * self.n // self.m


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

    def arrange(self, layer: SparseLayer, tensor: Tensor, absent: float = 0) -> Tensor:
        """See ``_Grouped``."""
        planes = tensor.movedim(layer.output_dim, 0).flatten(2) if tensor.ndim > 2 else tensor.unsqueeze(2)
        tiles = planes.permute(2, 0, 1).unfold(1, self.m, self.m).unfold(2, self.m, self.m)
        return tiles.reshape(-1, self.m * self.m, 1)

    def holds(self, layer: SparseLayer, mask: Tensor) -> bool:
        """See ``_Grouped``."""
        tiles = self.arrange(layer, mask).reshape(-1, self.m, self.m)
        return all(bool((tiles.sum(side) == self.n).all()) for side in (1, 2))

    def select(self, layer: SparseLayer, scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """See ``_Grouped``; the tiles of the largest sum."""
        return self._positions(layer, self._best_tiles(self._means(layer, scores), generator))[0]

    def _best_tiles(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Per row of values ``[tiles, m · m]`` the permitted tile of the largest sum, bool; ties at random."""
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
        """See ``_Grouped``.

        Dropping and growing are one choice here: that of the tiles with the most weights which the drop score keeps, and
        among those, of the highest sum of growth scores.
        """
        active = self.arrange(layer, mask)[:, :, 0]
        lows = self._means(layer, drop_scores)
        highs = lows if grow_scores is None else self._means(layer, grow_scores)
        kept = _without_lowest(active, lows, drop, generator)
        low, high = highs.amin(1, keepdim=True), highs.amax(1, keepdim=True)
        # Sums of a tile's growth scores stay below one, what was just dropped and what is kept weigh more.
        scaled = (highs - low) / (high - low).clamp(min=torch.finfo(highs.dtype).tiny) / (self.m * self.m)
        value = scaled + kept * 2.0 * (self.m * self.m)
        if not regrow_dropped:
            value = value - (active & ~kept) * 1.0
        chosen = self._best_tiles(value, generator)
        return Rewiring(*self._positions(layer, chosen & ~active, active & ~chosen))


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
