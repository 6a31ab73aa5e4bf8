"""The ``Conv1D`` of transformers, storing only its non-zero weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dst.kernels import Pattern
from dst.kernels.pattern import check_flat
from dst.nn.dense_conversion import filled
from dst.nn.sparse_linear import SparseLinear


class SparseConv1D(SparseLinear):
    """``y = x W + b`` with ``W`` of shape ``[in, out]``, storing only its non-zeros.

    Replaces the ``Conv1D`` of transformers, a linear layer with a transposed weight. The kernels read ``Wᵀ``, whose column
    order is the row-major order of ``W``. Positions, masks and dense tensors have the layout of ``W``.

    Args:
        in_features: Size of an input.
        out_features: Size of an output.
        indices: Row-major flat positions ``input * out_features + output`` of the non-zeros: int64, sorted, distinct.
        values: As in `SparseLinear`.
        dense_type: The class of the dense layer, called as ``dense_type(out_features, in_features)`` by `to_conv1d`.
        **options: Passed to `SparseLinear`.

    Shape:
        - Input: ``(*, in_features)``.
        - Output: ``(*, out_features)``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        indices: Tensor,
        values: Tensor | None = None,
        *,
        dense_type: type[nn.Module],
        **options: Any,
    ):
        super().__init__(in_features, out_features, indices, values, **options)
        self.dense_type = dense_type

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(in_features, out_features)`` of the dense weight."""
        return self.in_features, self.out_features

    def _new_pattern(self, indices: Tensor) -> Pattern:
        check_flat(indices, self.in_features, self.out_features)
        return self._matrix_pattern(self._in_matrix(indices))

    def _in_matrix(self, indices: Tensor) -> Tensor:
        """The sorted positions in ``Wᵀ`` of positions in ``W``."""
        inputs = indices.div(max(1, self.out_features), rounding_mode="floor")
        outputs = indices - inputs * self.out_features
        return (outputs * self.in_features + inputs).sort().values

    def rewire(self, grown: Tensor, dropped: Tensor) -> Tensor:
        """Grow and drop weights; see `SparseLinear.rewire`."""
        return super().rewire(self._in_matrix(grown), self._in_matrix(dropped))

    def positions(self) -> Tensor:
        """Return the sorted row-major positions of the non-zeros in the dense weight, int64 ``[nnz]``."""
        flat = self._pattern.flat_by_position()
        outputs = flat.div(max(1, self.in_features), rounding_mode="floor")
        return (flat - outputs * self.in_features) * self.out_features + outputs

    def row_major(self, entries: Tensor) -> Tensor:
        """Return the entries, which are in row-major order of the dense weight; ``[nnz]``."""
        return entries.detach()

    def mask(self) -> Tensor:
        """Return the bool mask ``[in_features, out_features]``."""
        return super().mask().t().contiguous()

    def to_dense(self, entries: Tensor) -> Tensor:
        """Scatter one entry per non-zero into a tensor ``[in_features, out_features]``, zeros elsewhere."""
        return super().to_dense(entries).t().contiguous()

    def from_dense(self, dense: Tensor) -> Tensor:
        """Gather the entries of a dense ``[in, out]`` tensor at the non-zeros, ``[nnz]`` in the order of `values`."""
        return dense.detach().reshape(-1)[self.positions()]

    def to_conv1d(self) -> nn.Module:
        """Return a ``dense_type`` with the same weights and bias, without a fused ReLU."""
        return filled(self.dense_type(self.out_features, self.in_features).to(self.values.dtype), self)

    def _product(self, x: Tensor, g: Tensor, first: int, last: int, tile: Tensor, add: bool) -> None:
        torch.addmm(tile, x[first:last], g.t(), beta=float(add), out=tile)
