"""Positions of the non-zeros of a weight matrix, in row and column order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dst.errors import ConfigurationError

UNFIT = "the positions to grow and drop do not fit the pattern: they must be sorted and distinct, inactive and active"


@dataclass(frozen=True, eq=False)
class Pattern:
    """The positions of the non-zeros of a ``[rows, columns]`` matrix. Values are stored in column order.

    The *position* of a non-zero is its index in column order (by column, then by row). Its *flat* index is row-major:
    ``row * columns + column``.

    Attributes:
        rows: Number of rows (output features).
        columns: Number of columns (input features).
        column_pointers: Start of each column in column order, int32 ``[columns + 1]``.
        row_indices: Rows in column order, ``[nnz]``; uint16 if they fit and the engine supports it, otherwise int32.
        row_pointers: Start of each row in row order, int32 ``[rows + 1]``.
        column_indices: Columns in row order, ``[nnz]``; dtype of ``row_indices``.
        permutation: Row order → column order, int32 ``[nnz]``.
    """

    rows: int
    columns: int
    column_pointers: Tensor
    row_indices: Tensor
    row_pointers: Tensor
    column_indices: Tensor
    permutation: Tensor

    @property
    def nnz(self) -> int:
        """Number of non-zeros."""
        return self.permutation.numel()

    @cached_property
    def wide(self) -> bool:
        """Whether the indices are 32-bit."""
        return self.row_indices.dtype is torch.int32

    @cached_property
    def by_row(self) -> tuple[int, int]:
        """Addresses of `row_pointers` and `column_indices`. The index tensors never change, so they are read once."""
        return self.row_pointers.data_ptr(), self.column_indices.data_ptr()

    @cached_property
    def by_column(self) -> tuple[int, int, int]:
        """Addresses of `column_pointers`, `row_indices` and `permutation`."""
        return self.column_pointers.data_ptr(), self.row_indices.data_ptr(), self.permutation.data_ptr()

    def __getstate__(self) -> dict[str, Any]:
        """The fields. Copies have addresses of their own."""
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    @property
    def nbytes(self) -> int:
        """Bytes held by all index tensors."""
        tensors = (self.column_pointers, self.row_indices, self.row_pointers, self.column_indices, self.permutation)
        return sum(t.numel() * t.element_size() for t in tensors)

    def flat(self) -> Tensor:
        """Return the sorted row-major flat indices, int64 ``[nnz]``."""
        return _expand(self.row_pointers, self.columns).add_(self.column_indices.to(torch.int64))

    def flat_by_position(self) -> Tensor:
        """Return the flat index of every position, int64 ``[nnz]``, in the order of the values."""
        flat = self.row_indices.to(torch.int64).mul_(self.columns)
        return flat.add_(_expand(self.column_pointers, 1))

    def mask(self) -> Tensor:
        """Return the bool mask ``[rows, columns]``. Materializes it: for small layers and for conversion."""
        mask = torch.zeros(self.rows * self.columns, dtype=torch.bool)
        mask[self.flat()] = True
        return mask.view(self.rows, self.columns)


def _expand(pointers: Tensor, scale: int) -> Tensor:
    counts = (pointers[1:] - pointers[:-1]).to(torch.int64)
    lines = torch.arange(counts.numel(), dtype=torch.int64).mul_(scale)
    return torch.repeat_interleave(lines, counts, output_size=int(pointers[-1]))


def split_flat(flat: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Split sorted flat indices into int32 row pointers ``[rows + 1]`` and int64 column indices ``[nnz]``."""
    edges = torch.arange(rows + 1, dtype=torch.int64).mul_(columns)
    pointers = torch.searchsorted(flat, edges).to(torch.int32)
    return pointers, flat.remainder(columns) if columns else flat


def check_flat(flat: Tensor, rows: int, columns: int) -> None:
    """Check that ``flat`` holds sorted distinct flat indices of a ``[rows, columns]`` matrix.

    Raises:
        ConfigurationError: The dtype or shape is wrong, there are too many non-zeros, or the indices are out of range,
            unsorted or repeated.
    """
    if flat.dtype != torch.int64 or flat.dim() != 1:
        raise ConfigurationError(f"indices is {flat.dtype} {tuple(flat.shape)}; a 1-D int64 tensor is needed")
    if flat.numel() >= 1 << 31 or max(columns, rows) >= (1 << 31) - 1:
        raise ConfigurationError(f"a layer with {flat.numel()} non-zeros exceeds 32-bit positions; split it")
    if flat.numel():
        if int(flat[0]) < 0 or int(flat[-1]) >= rows * columns:
            raise ConfigurationError(
                f"indices reach from {int(flat[0])} to {int(flat[-1])}; "
                f"a {rows}x{columns} layer has positions 0 to {rows * columns - 1}"
            )
        if not bool((flat[1:] > flat[:-1]).all()):
            raise ConfigurationError("indices are not strictly increasing; pass indices.unique()")
