"""Grouped patterns: one top-k over [scopes, groups, elements]."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.topology.layers import SparseLayer
from dst.topology.rewiring import Rewiring
from dst.topology.selection import tie_key, tie_order, top_indices


class Grouped:
    """Base of patterns with groups or scopes: top-k over the groups of every scope.

    A pattern defines ``arrange``, and ``_elements`` if its groups have more than one weight.
    """

    is_grouped: ClassVar[bool] = True
    is_free: ClassVar[bool] = True

    def arrange(self, layer: SparseLayer, tensor: Tensor, absent: float = 0) -> Tensor:
        """Arrange a tensor of the layer's shape as a table ``[scopes, groups, elements]``.

        Args:
            layer: The layer.
            tensor: Any dtype, of the layer's shape.
            absent: Value of missing groups, in scopes that have fewer groups than others.
        """
        raise NotImplementedError

    def _exists(self, layer: SparseLayer, table: Tensor) -> Tensor:
        """Bool ``[scopes, groups]``, False for missing groups, on the device of ``table``."""
        return torch.ones(table.shape[:2], dtype=torch.bool, device=table.device)

    def _positions(self, layer: SparseLayer, *chosen: Tensor) -> list[Tensor]:
        """Sorted row-major positions of the weights in chosen groups (each bool ``[scopes, groups]``)."""
        everything = self.arrange(layer, torch.arange(layer.weights, device=chosen[0].device).view(layer.shape), -1)
        return [everything[groups].reshape(-1).sort().values for groups in chosen]

    def spread(self, layer: SparseLayer, scores: Tensor) -> Tensor:
        """Return the mean score of its group for every weight, of the layer's shape."""
        means = self._means(layer, scores)
        positions = self.arrange(layer, torch.arange(layer.weights, device=scores.device).view(layer.shape))
        result = torch.empty(layer.shape, dtype=means.dtype, device=means.device)
        return result.put_(positions, means[:, :, None].expand(positions.shape).contiguous())

    def for_density(self, density: float) -> Grouped:
        """Return the pattern itself."""
        return self

    def unsupported_reason(self, layer: SparseLayer) -> str | None:
        """Return why the layer cannot have the pattern and stays dense, or ``None`` if it can."""
        return None

    def fit(self, layer: SparseLayer, count: int) -> int:
        """Return the number of active weights nearest to ``count`` in whole groups, at least one."""
        elements = self._elements(layer)
        return min(layer.weights // elements, max(1, round(count / elements))) * elements

    def _elements(self, layer: SparseLayer) -> int:
        """Weights per group."""
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
        """Quotas after an update; ``wanted`` has grow scores, -inf where nothing may grow; all ``[scopes, groups]``."""
        return self._quotas(layer, target, exists)

    def holds(self, layer: SparseLayer, mask: Tensor) -> bool:
        """Return whether a mask (bool, of the layer's shape) has whole groups, and the quota in every scope."""
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
        """Return the positions of the best groups of every scope.

        Args:
            layer: The layer.
            scores: Float, of the layer's shape.
            count: Number of active weights, as ``fit`` returns it.
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
        """Drop the lowest groups of the layer, then grow every scope to its quota.

        If a quota shrank and a scope keeps more groups than that, the scope drops its lowest. If a scope has too few
        candidates, groups dropped in this update return even if ``regrow_dropped`` is False.

        Args:
            layer: The layer.
            mask: Bool, the present mask, of the layer's shape, with whole groups. Scopes may miss their quotas.
            drop_scores: Float, of the layer's shape; the lowest groups are dropped.
            grow_scores: Float, of the layer's shape; the highest groups are grown. ``None`` for the drop scores.
            drop: Number of weights to drop, rounded down to whole groups.
            grow: Number of weights to grow. Active weights - ``drop`` + ``grow`` is a number that ``fit`` returns.
            regrow_dropped: Whether a group dropped in this update may be grown again.
            generator: CPU generator that breaks ties.

        Returns:
            Positions of single weights.
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
            # Kept groups first, by drop score; then candidates, by grow score; then groups dropped in this update.
            rank = kept[odd] * 2 + candidates[odd].long() + exists[odd]
            value = torch.where(kept, lows, highs)[odd]
            chosen[odd] = _best_by_rank(rank, value, quotas[odd], generator) & exists[odd]
        return Rewiring(*self._positions(layer, chosen & ~active, active & ~chosen))


def without_lowest(active: Tensor, scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return ``active`` (bool) without the ``count`` lowest scores."""
    positions = active.reshape(-1).nonzero().squeeze(1)
    best = top_indices(scores.reshape(-1)[positions], max(0, positions.numel() - count), generator)
    kept = torch.zeros(active.shape, dtype=torch.bool, device=active.device)  # contiguous, unlike some tables
    kept.view(-1)[positions[best]] = True
    return kept


def best_per_scope(values: Tensor, quotas: Tensor, generator: torch.Generator) -> Tensor:
    """Select the highest values of every row; ties at random.

    Args:
        values: Float ``[scopes, groups]``, no NaN.
        quotas: Number to select in each row, int64 ``[scopes]``, in [0, groups].
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
    """``best_per_scope`` by rank, and by value among equal ranks."""
    key = tie_key(generator)
    positions = torch.arange(values.numel(), device=values.device).view(values.shape)
    order = tie_order(positions, key).argsort(1)
    for by in (values, rank):  # a stable sort keeps the previous order among equals
        order = order.gather(1, by.gather(1, order).argsort(dim=1, descending=True, stable=True))
    chosen = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    places = torch.arange(values.shape[1], device=values.device)[None]
    return chosen.scatter_(1, order, places < quotas[:, None])


def matrix_of(layer: SparseLayer, tensor: Tensor) -> Tensor:
    """Return a tensor of the layer's shape as ``[outputs, inputs · kernel]``."""
    tensor = tensor.movedim(layer.output_dim, 0)
    return tensor.reshape(tensor.shape[0], -1)


def matrix_shape(layer: SparseLayer) -> tuple[int, int]:
    """Return the number of outputs, and of weights per output."""
    outputs = layer.shape[layer.output_dim]
    return outputs, layer.weights // outputs


def channels(layer: SparseLayer) -> int:
    """Return the number of input channels."""
    return next(size for d, size in enumerate(layer.shape) if d != layer.output_dim)


def check_positive(**sizes: int) -> None:
    """Raise ``ConfigurationError`` unless all sizes, passed by name, are positive integers."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigurationError(f"{name}={size!r} must be a positive integer")
