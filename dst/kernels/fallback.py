"""The engine without compiled kernels: the same interface on torch's CSR operations."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.kernels.geometry import ConvShape
from dst.kernels.pattern import UNFIT, Pattern, split_flat
from dst.topology.selection import cancel, partition, tie_order, without


def _csr(pointers: Tensor, indices: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(pointers, indices, values, size=shape, check_invariants=False)


def _is_sorted(positions: Tensor) -> bool:
    """Whether positions are sorted and distinct."""
    return bool((positions[1:] > positions[:-1]).all())


class TorchKernels:
    """Computes products with ``torch.mm`` on CSR tensors, and gradients of the values with ``sampled_addmm``."""

    name = "torch"

    def __init__(self) -> None:
        """Suppress torch's warning that CSR is in beta. torch warns once per process."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta.*")
            _csr(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))

    def pattern(self, flat: Tensor, rows: int, columns: int) -> Pattern:
        """Build a pattern from sorted, distinct flat indices (int64)."""
        row_pointers, column_indices = split_flat(flat, rows, columns)
        # A stable sort keeps the rows ordered within a column.
        by_column = torch.argsort(column_indices, stable=True)
        permutation = torch.empty_like(by_column)
        permutation[by_column] = torch.arange(flat.numel())
        row_of = torch.div(flat, max(columns, 1), rounding_mode="floor")
        counts = torch.bincount(column_indices, minlength=columns)
        column_pointers = torch.zeros(columns + 1, dtype=torch.int32)
        column_pointers[1:] = counts.cumsum(0)
        kind = torch.int32
        return Pattern(
            rows, columns, column_pointers, row_of[by_column].to(kind), row_pointers, column_indices.to(kind),
            permutation.to(kind),
        )  # fmt: skip

    def match(self, old: Pattern, new: Pattern) -> Tensor:
        """Return int64 ``[new.nnz]``: the old position of each new position, -1 where it is newly grown."""
        source = torch.full((new.nnz,), -1, dtype=torch.int64)
        if old.nnz:
            before, after = old.flat(), new.flat()
            at = torch.searchsorted(before, after).clamp_(max=old.nnz - 1)
            same = before[at] == after
            source[new.permutation.to(torch.int64)[same]] = old.permutation.to(torch.int64)[at[same]]
        return source

    def flat(self, pattern: Pattern, first: int = 0, last: int | None = None) -> Tensor:
        """Return the sorted flat indices of the non-zeros of some rows; see `Kernels.flat`."""
        last = pattern.rows if last is None else last
        span = slice(int(pattern.row_pointers[first]), int(pattern.row_pointers[last]))
        return pattern.flat()[span] - first * pattern.columns

    def rewire(self, old: Pattern, grown: Tensor, dropped: Tensor) -> tuple[Pattern, Tensor]:
        """Drop and grow positions; see `Kernels.rewire`."""
        before = old.flat()
        kept = without(before, dropped)
        flat = torch.cat([kept, grown]).sort().values
        if kept.numel() + dropped.numel() != before.numel() or not (_is_sorted(grown) and _is_sorted(dropped)):
            raise ConfigurationError(UNFIT)
        if not _is_sorted(flat) or (flat.numel() and not 0 <= int(flat[0]) <= int(flat[-1]) < old.rows * old.columns):
            raise ConfigurationError(UNFIT)
        new = self.pattern(flat, old.rows, old.columns)
        return new, self.match(old, new)

    def remap(self, entries: Tensor, source: Tensor, grown: Tensor | None = None) -> Tensor:
        """Carry entries to a new pattern; see `Kernels.remap`."""
        grown = entries.new_zeros(()) if grown is None else grown
        if entries.numel() == 0:
            return grown.expand(source.shape).clone()
        return torch.where(source >= 0, entries[source.clamp(min=0)], grown)

    def partition(self, positions: Tensor, scores: Tensor, keep: int, key: int) -> tuple[Tensor, Tensor]:
        """Split positions by score; see `dst.topology.selection.partition`."""
        return partition(positions, scores, keep, key)

    def cancel(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Remove from both what both contain; see `dst.topology.selection.cancel`."""
        return cancel(a, b)

    def refresh(self, pattern: Pattern, values: Tensor, out: Tensor) -> None:
        """Copy ``values`` (column order) into ``out`` (row order)."""
        torch.index_select(values, 0, pattern.permutation, out=out)

    def feature_major(self, x: Tensor) -> Tensor:
        """Return ``x`` ``[batch, features]`` as a contiguous ``[features, batch]`` tensor."""
        return x.t().contiguous()

    def forward(self, pattern: Pattern, row_values: Tensor, x: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        """Return ``W x + bias`` (then ReLU) as ``[batch, rows]``; see `Kernels.forward`."""
        if pattern.nnz == 0 or x.shape[1] == 0:
            y = torch.zeros(pattern.rows, x.shape[1], dtype=x.dtype)
        else:
            weight = _csr(pattern.row_pointers, pattern.column_indices, row_values, (pattern.rows, pattern.columns))
            y = weight @ x
        if bias is not None:
            y.add_(bias.unsqueeze(1))
        return (y.relu_() if relu else y).t()

    def backward(
        self, pattern: Pattern, values: Tensor, x: Tensor, g: Tensor, y: Tensor | None, *, input: bool, bias: bool
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
        """Return the gradients of input, values, bias and output; see `Kernels.backward`."""
        gt = g.t().contiguous()
        if y is not None:
            gt = torch.ops.aten.threshold_backward(gt, y.t(), 0)
        gb = gt.sum(1) if bias else None
        if pattern.nnz == 0 or x.shape[1] == 0:
            gx = torch.zeros(pattern.columns, x.shape[1], dtype=x.dtype).t() if input else None
            return gx, torch.zeros_like(values), gb, gt
        weight = _csr(pattern.column_pointers, pattern.row_indices, values, (pattern.columns, pattern.rows))
        gx = (weight @ gt).t() if input else None
        gv = torch.sparse.sampled_addmm(weight, x, gt.t(), beta=0.0).values()
        return gx, gv, gb, gt

    def conv_forward(
        self, pattern: Pattern, shape: ConvShape, row_values: Tensor, x: Tensor, bias: Tensor | None, relu: bool = False
    ) -> Tensor:
        """Convolve images as in the compiled engine, but with the dense weight: torch has no sparse convolution."""
        weight = torch.zeros(pattern.rows * pattern.columns, dtype=x.dtype)
        weight[pattern.flat()] = row_values
        y = torch.conv2d(x, weight.view(shape.weight), bias, shape.stride, shape.padding, shape.dilation)
        return y.relu_() if relu else y

    def conv_backward(
        self, pattern: Pattern, shape: ConvShape, values: Tensor, x: Tensor, g: Tensor, *, input: bool, bias: bool
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Return the gradients of input, values and bias of a convolution; as in the compiled engine."""
        flat = pattern.flat_by_position()
        weight = torch.zeros(pattern.rows * pattern.columns, dtype=x.dtype)
        weight[flat] = values
        gx, gw, gb = torch.ops.aten.convolution_backward(
            g, x, weight.view(shape.weight), [pattern.rows], shape.stride, shape.padding, shape.dilation, False, [0, 0],
            1, [input, True, bias],
        )  # fmt: skip
        return gx if input else None, gw.reshape(-1)[flat], gb if bias else None

    def top_k(self, k: int, dtype: torch.dtype, key: int) -> TorchTopK:
        """Return an empty running top-k for tiles of ``dtype``; ``key`` breaks ties."""
        return TorchTopK(k, dtype, key)


class TorchTopK:
    """A running top-k by absolute value over the tiles of a matrix. ``tie_order`` breaks ties."""

    def __init__(self, k: int, dtype: torch.dtype, key: int):
        self._k, self._key = k, key
        self._values = torch.empty(0, dtype=dtype)
        self._indices = torch.empty(0, dtype=torch.int64)
        self._threshold = -1.0

    def update(self, tile: Tensor, base: int, exclude: Tensor) -> None:
        """Add the next tile; see `NativeTopK.update`."""
        flat = tile.view(-1)
        flat[exclude - base] = torch.nan
        flat = flat.abs_()
        better = (flat >= self._threshold).nonzero().squeeze(1)
        self._values = torch.cat([self._values, flat[better]])
        self._indices = torch.cat([self._indices, better.add_(base)])
        if self._values.numel() >= 2 * self._k:
            self._prune()

    def _prune(self) -> None:
        surplus = self._values.numel() - self._k
        if self._k == 0:
            self._values, self._indices = self._values[:0], self._indices[:0]
            self._threshold = torch.inf
        elif surplus > 0:
            least = self._values.kthvalue(surplus + 1).values
            keep = self._values > least
            ties = (self._values == least).nonzero().squeeze(1)
            order = tie_order(self._indices[ties], self._key)
            keep[ties[order <= order.kthvalue(self._k - int(keep.sum())).values]] = True
            self._values, self._indices = self._values[keep], self._indices[keep]
            self._threshold = float(least)

    def finish(self) -> Tensor:
        """Return the flat indices of the top k, sorted, int64 ``[<= k]``."""
        self._prune()
        return self._indices
