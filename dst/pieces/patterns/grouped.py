"""Patterns as one top-k over [scopes, groups, elements]: what all of them share."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.topology.layers import SparseLayer
from dst.topology.rewiring import Rewiring
from dst.topology.selection import tie_key, tie_order, top_indices


class Grouped:
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

    def for_density(self, density: float) -> Grouped:
        """The pattern with what depends on the network's density resolved."""
        return self

    def unsupported_reason(self, layer: SparseLayer) -> str | None:
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
        kept = without_lowest(active, lows, drop // self._elements(layer), generator)
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


def without_lowest(active: Tensor, scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
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


def matrix_of(layer: SparseLayer, tensor: Tensor) -> Tensor:
    """A tensor of the layer's shape as ``[outputs, inputs · kernel]``."""
    tensor = tensor.movedim(layer.output_dim, 0)
    return tensor.reshape(tensor.shape[0], -1)


def matrix_shape(layer: SparseLayer) -> tuple[int, int]:
    """Outputs, and weights of each."""
    outputs = layer.shape[layer.output_dim]
    return outputs, layer.weights // outputs


def channels(layer: SparseLayer) -> int:
    """Input channels."""
    return next(size for d, size in enumerate(layer.shape) if d != layer.output_dim)


def check_positive(**sizes: int) -> None:
    """Raise ``ConfigurationError`` for a size, by its name, that is no positive integer."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigurationError(f"{name}={size!r} must be a positive integer")
