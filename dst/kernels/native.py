"""The compiled engine: the kernels of ``spmm.cpp`` on tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int64
from pathlib import Path

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.kernels.chain import ChainLayer, CompiledChain
from dst.kernels.geometry import ConvShape
from dst.kernels.layer import CompiledLayer
from dst.kernels.library import ISA, open_library
from dst.kernels.pattern import UNFIT, Pattern, split_flat
from dst.kernels.planes import ConvPlanes


class Kernels:
    """Compiled kernels for float32 and float64 on the CPU.

    Activations are feature-major ``[batch, features]`` tensors (strides ``(1, batch)``), so a chain of layers never copies
    them. Results do not depend on the number or timing of threads.
    """

    name = "compiled"

    def __init__(self, path: Path):
        """Load the library at ``path``.

        Raises:
            OSError: The file cannot be loaded, or has another interface version.
        """
        self._library = open_library(path)
        self.path = path
        self._forward = self._library.dst_forward
        self._backward = self._library.dst_backward
        self._gradient = self._library.dst_gradient
        self._gather = self._library.dst_gather
        self._conv_forward = self._library.dst_conv_forward
        self._conv_backward = self._library.dst_conv_backward

    @property
    def isa(self) -> str:
        """Instruction set in use: "avx512", "avx2" or "portable"."""
        return ISA[self._library.dst_isa()]

    @isa.setter
    def isa(self, wanted: str) -> None:
        self._library.dst_set_isa(ISA.index(wanted))

    def pattern(self, flat: Tensor, rows: int, columns: int) -> Pattern:
        """Build a pattern from sorted, distinct flat indices (int64)."""
        kind = torch.uint16 if max(rows, columns) <= 1 << 16 else torch.int32
        row_pointers, column_indices = split_flat(flat, rows, columns)
        column_indices = column_indices.to(kind)
        column_pointers = torch.empty(columns + 1, dtype=torch.int32)
        row_indices = torch.empty_like(column_indices)
        permutation = torch.empty(flat.numel(), dtype=torch.int32)
        self._library.dst_transpose_pattern(
            kind is torch.int32, rows, columns, row_pointers.data_ptr(), column_indices.data_ptr(),
            column_pointers.data_ptr(), row_indices.data_ptr(), permutation.data_ptr(),
        )  # fmt: skip
        return Pattern(rows, columns, column_pointers, row_indices, row_pointers, column_indices, permutation)

    def match(self, old: Pattern, new: Pattern) -> Tensor:
        """Return int64 ``[new.nnz]``: the old position of each new position, -1 where it is newly grown."""
        source = torch.empty(new.nnz, dtype=torch.int64)
        self._library.dst_match_patterns(
            new.wide, new.rows, old.row_pointers.data_ptr(), old.column_indices.data_ptr(), old.permutation.data_ptr(),
            new.row_pointers.data_ptr(), new.column_indices.data_ptr(), new.permutation.data_ptr(), source.data_ptr(),
        )  # fmt: skip
        return source

    def flat(self, pattern: Pattern, first: int = 0, last: int | None = None) -> Tensor:
        """Return the sorted flat indices of the non-zeros of rows ``first`` to ``last``, int64.

        Args:
            pattern: The pattern.
            first: The first row. Flat indices are counted from its start.
            last: The row after the last, by default the number of rows.
        """
        last = pattern.rows if last is None else last
        whole = (first, last) == (0, pattern.rows)
        pointers = pattern.row_pointers
        out = torch.empty(pattern.nnz if whole else int(pointers[last]) - int(pointers[first]), dtype=torch.int64)
        self._library.dst_flat(
            pattern.wide, first, last, pattern.columns, pointers.data_ptr(), pattern.column_indices.data_ptr(),
            out.data_ptr(),
        )  # fmt: skip
        return out

    def rewire(self, old: Pattern, grown: Tensor, dropped: Tensor) -> tuple[Pattern, Tensor]:
        """Drop and grow positions.

        Args:
            old: The pattern before.
            grown: Sorted flat indices that become non-zeros, int64.
            dropped: Sorted flat indices of non-zeros that are removed, int64.

        Returns:
            The new pattern, and its `match` with the old one.

        Raises:
            ConfigurationError: The indices are not sorted and distinct, a grown one is a non-zero or out of range, or a
                dropped one is not a non-zero.
        """
        grown, dropped = grown.contiguous(), dropped.contiguous()
        rows, columns, nnz = old.rows, old.columns, max(0, old.nnz - dropped.numel() + grown.numel())
        row_pointers, column_pointers = torch.empty_like(old.row_pointers), torch.empty_like(old.column_pointers)
        kind = old.row_indices.dtype
        column_indices, row_indices = torch.empty(nnz, dtype=kind), torch.empty(nnz, dtype=kind)
        permutation, source = torch.empty(nnz, dtype=torch.int32), torch.empty(nnz, dtype=torch.int64)
        failed = self._library.dst_rewire_pattern(
            old.wide, rows, columns, old.row_pointers.data_ptr(), old.column_indices.data_ptr(),
            old.permutation.data_ptr(), grown.numel(), grown.data_ptr(), dropped.numel(), dropped.data_ptr(),
            row_pointers.data_ptr(), column_indices.data_ptr(), column_pointers.data_ptr(), row_indices.data_ptr(),
            permutation.data_ptr(), source.data_ptr(),
        )  # fmt: skip
        if failed:
            raise ConfigurationError(UNFIT)
        return Pattern(rows, columns, column_pointers, row_indices, row_pointers, column_indices, permutation), source

    def remap(self, entries: Tensor, source: Tensor, grown: Tensor | None = None) -> Tensor:
        """Carry entries to a new pattern.

        Args:
            entries: One entry per non-zero of the old pattern, of at most 8 bytes each.
            source: What `match` or `rewire` returned.
            grown: The entries of newly grown non-zeros, ``[new nnz]``, of the same dtype; zero by default.

        Returns:
            One entry per non-zero of the new pattern.
        """
        entries = entries.contiguous()
        grown = None if grown is None else grown.contiguous()
        out = torch.empty(source.numel(), dtype=entries.dtype)
        self._library.dst_remap(
            entries.element_size(), source.numel(), source.data_ptr(), entries.data_ptr(),
            None if grown is None else grown.data_ptr(), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def partition(self, positions: Tensor, scores: Tensor, keep: int, key: int) -> tuple[Tensor, Tensor]:
        """Split positions by score; see `dst.topology.selection.partition`."""
        if scores.dtype not in (torch.float32, torch.float64):
            scores = scores.double()
        positions, scores = positions.contiguous(), scores.contiguous()
        # The kernel writes each position to both, so it needs room for one more.
        kept = torch.empty(keep + 1, dtype=torch.int64)
        others = torch.empty(positions.numel() - keep + 1, dtype=torch.int64)
        self._library.dst_partition(
            scores.dtype is torch.float64, positions.numel(), positions.data_ptr(), scores.data_ptr(), keep, key,
            kept.data_ptr(), others.data_ptr(),
        )  # fmt: skip
        return kept[:-1], others[:-1]

    def cancel(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Remove from both what both contain; see `dst.topology.selection.cancel`."""
        a, b = a.contiguous(), b.contiguous()
        a_out, b_out = torch.empty(a.numel() + 1, dtype=torch.int64), torch.empty(b.numel() + 1, dtype=torch.int64)
        lengths = torch.empty(2, dtype=torch.int64)
        self._library.dst_cancel(
            a.numel(), a.data_ptr(), b.numel(), b.data_ptr(), a_out.data_ptr(), b_out.data_ptr(), lengths.data_ptr()
        )
        first, second = lengths.tolist()
        return a_out[:first], b_out[:second]

    def refresh(self, pattern: Pattern, values: Tensor, out: Tensor) -> None:
        """Copy ``values`` (column order) into ``out`` (row order)."""
        self._gather(
            values.dtype is torch.float64, pattern.nnz, pattern.by_column[2], values.data_ptr(),
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip

    def feature_major(self, x: Tensor) -> Tensor:
        """Return ``x`` ``[batch, features]`` as a ``[features, batch]`` tensor with stride 1 over the batch."""
        batch, features = x.shape
        if batch == 1:
            return x.contiguous().view(features, 1)
        if x.stride(0) == 1 and x.stride(1) >= batch:
            return x.t()
        if not (x.stride(1) == 1 and x.stride(0) >= features):
            x = x.contiguous()
        out = torch.empty(features, batch, dtype=x.dtype)
        self._gradient(
            x.dtype is torch.float64, features, batch, x.data_ptr(), x.stride(0), 1, None, 0, out.data_ptr(), None,
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def forward(
        self,
        pattern: Pattern,
        row_values: Tensor,
        x: Tensor,
        bias: Tensor | None,
        relu: bool,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return ``W x + bias`` (then ReLU) as ``[batch, rows]``, strides ``(1, batch)``.

        Args:
            pattern: Positions of the non-zeros.
            row_values: Values in row order, ``[nnz]``.
            x: ``[columns, batch]`` from `feature_major`.
            bias: ``[rows]``, contiguous, or None.
            relu: Whether to apply ReLU.
            out: Contiguous ``[rows, batch]`` that receives the output, if given.
        """
        batch = x.shape[1]
        y = torch.empty_strided((batch, pattern.rows), (1, max(batch, 1)), dtype=x.dtype) if out is None else out.t()
        self._forward(
            x.dtype is torch.float64, pattern.wide, pattern.rows, pattern.columns, *pattern.by_row, row_values.data_ptr(), x.data_ptr(), x.stride(0), y.data_ptr(), batch,
            batch, None if bias is None else bias.data_ptr(), relu, torch.get_num_threads(),
        )  # fmt: skip
        return y

    def transposed_product(self, pattern: Pattern, values: Tensor, g: Tensor) -> Tensor:
        """Return ``Wᵀ g``, contiguous ``[columns, batch]``.

        Args:
            pattern: Positions of the non-zeros.
            values: Values in column order, ``[nnz]``, contiguous.
            g: ``[rows, batch]``, contiguous.
        """
        batch = g.shape[1]
        y = torch.empty(pattern.columns, batch, dtype=g.dtype)
        # Column order is the row order of the transposed weight.
        self._forward(
            g.dtype is torch.float64, pattern.wide, pattern.columns, pattern.rows, pattern.column_pointers.data_ptr(),
            pattern.row_indices.data_ptr(), values.data_ptr(), g.data_ptr(), batch, y.data_ptr(), batch, batch, None, 0,
            torch.get_num_threads(),
        )  # fmt: skip
        return y

    def backward(
        self, pattern: Pattern, values: Tensor, x: Tensor, g: Tensor, y: Tensor | None, *, input: bool, bias: bool
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
        """Return the gradients of input, values, bias and output.

        Args:
            pattern: Positions of the non-zeros.
            values: Values in column order, ``[nnz]``.
            x: ``[columns, batch]``, the input of `forward`.
            g: Gradient of the output, ``[batch, rows]``, any strides.
            y: The output if `forward` applied ReLU, otherwise None.
            input: Whether to compute the gradient of the input.
            bias: Whether to compute the gradient of the bias.

        Returns:
            Gradient of the input, ``[batch, columns]`` with strides ``(1, batch)``, or None; of the values, ``[nnz]``; of
            the bias, ``[rows]``, or None; and of the output before ReLU, feature-major ``[rows, batch]``.
        """
        double, threads = x.dtype is torch.float64, torch.get_num_threads()
        batch, rows = g.shape
        gb = torch.empty(rows, dtype=x.dtype) if bias else None
        if batch > 1 and g.stride(0) == 1 and g.stride(1) >= batch:
            batch_major, stride = 0, g.stride(1)
        else:
            if not (g.stride(1) == 1 and g.stride(0) >= rows):
                g = g.contiguous()
            batch_major, stride = 1, g.stride(0)
        gt = torch.empty(rows, batch, dtype=x.dtype) if batch_major or y is not None else g.t()
        if batch_major or y is not None or bias:
            self._gradient(
                double, rows, batch, g.data_ptr(), stride, batch_major, None if y is None else y.data_ptr(), batch,
                gt.data_ptr() if batch_major or y is not None else None, None if gb is None else gb.data_ptr(), threads,
            )  # fmt: skip
        gx = torch.empty_strided((batch, pattern.columns), (1, max(batch, 1)), dtype=x.dtype) if input else None
        gv = torch.empty_like(values)
        self._backward(
            double, pattern.wide, rows, pattern.columns, *pattern.by_column[:2], values.data_ptr(), x.data_ptr(), x.stride(0), gt.data_ptr(), gt.stride(0),
            None if gx is None else gx.data_ptr(), batch, gv.data_ptr(), batch, threads,
        )  # fmt: skip
        return gx, gv, gb, gt

    def rows_forward(
        self,
        pattern: Pattern,
        row_values: Tensor,
        x: Tensor,
        bias: Tensor | None,
        relu: bool = False,
        *,
        gelu: bool = False,
        derivative: Tensor | None = None,
    ) -> Tensor:
        """Return ``x Wᵀ + bias`` (then ReLU) for a row-major batch.

        Args:
            pattern: Positions of the non-zeros.
            row_values: Values in row order, ``[nnz]``.
            x: ``[batch, columns]``; copied unless its rows are contiguous.
            bias: ``[rows]``, contiguous, or None.
            relu: Whether to apply ReLU.
            gelu: Whether to apply GELU.
            derivative: Receives the derivative of GELU, ``[batch, rows]``, contiguous; None if it is not needed.

        Returns:
            ``[batch, rows]``, contiguous.
        """
        x = _row_major(x)
        batch = x.shape[0]
        y = torch.empty(batch, pattern.rows, dtype=x.dtype)
        failed = self._library.dst_rows_forward(
            x.dtype is torch.float64, pattern.wide, pattern.rows, pattern.columns, *pattern.by_row, row_values.data_ptr(), x.data_ptr(), x.stride(0), y.data_ptr(),
            pattern.rows, batch, None if bias is None else bias.data_ptr(), 2 if gelu else int(relu),
            None if derivative is None else derivative.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for the scratch of a {pattern.rows}x{pattern.columns} layer")
        return y

    def rows_backward(
        self,
        pattern: Pattern,
        values: Tensor,
        x: Tensor,
        g: Tensor,
        y: Tensor | None,
        *,
        input: bool,
        bias: bool,
        derivative: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Return the gradients of input, values and bias for a row-major batch.

        Args:
            pattern: Positions of the non-zeros.
            values: Values in column order, ``[nnz]``.
            x: ``[batch, columns]``, the input of `rows_forward`.
            g: Gradient of the output, ``[batch, rows]``; copied unless its rows are contiguous.
            y: The output if ReLU was applied, otherwise None.
            input: Whether to compute the gradient of the input.
            bias: Whether to compute the gradient of the bias.
            derivative: The derivative of GELU from `rows_forward`, which multiplies the output gradient; otherwise None.

        Returns:
            Input gradient ``[batch, columns]``, contiguous, or None; values' gradient ``[nnz]``; bias gradient ``[rows]``
            or None.
        """
        x, g = _row_major(x), _row_major(g)
        factor = y if derivative is None else derivative
        factor = None if factor is None else _row_major(factor)
        batch, rows = g.shape
        gx = torch.empty(batch, pattern.columns, dtype=x.dtype) if input else None
        gv = torch.empty_like(values)
        gb = torch.empty(rows, dtype=x.dtype) if bias else None
        failed = self._library.dst_rows_backward(
            x.dtype is torch.float64, pattern.wide, rows, pattern.columns, *pattern.by_column[:2], values.data_ptr(), x.data_ptr(), x.stride(0), g.data_ptr(), g.stride(0),
            None if factor is None else factor.data_ptr(), 0 if factor is None else factor.stride(0),
            derivative is not None, None if gx is None else gx.data_ptr(), pattern.columns, gv.data_ptr(),
            None if gb is None else gb.data_ptr(), batch, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for the scratch of a {rows}x{pattern.columns} layer")
        return gx, gv, gb

    def conv_forward(
        self, pattern: Pattern, shape: ConvShape, row_values: Tensor, x: Tensor, bias: Tensor | None, relu: bool = False
    ) -> Tensor:
        """Convolve images with a sparse weight.

        Args:
            pattern: Positions of the non-zeros of the weight as ``[out, in * kernel height * kernel width]``.
            shape: Sizes of the convolution.
            row_values: Values in row order, ``[nnz]``.
            x: ``[batch, in, height, width]``, contiguous.
            bias: ``[out]``, contiguous, or None.
            relu: Whether to apply ReLU.

        Returns:
            ``[batch, out, out height, out width]``, contiguous.

        Raises:
            MemoryError: There is no memory for scratch.
        """
        y = torch.empty(shape.output, dtype=x.dtype)
        failed = self._conv_forward(
            x.dtype is torch.float64, pattern.wide, shape.address, *pattern.by_row, row_values.data_ptr(), x.data_ptr(), y.data_ptr(),
            None if bias is None else bias.data_ptr(), relu, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the scratch of a convolution")
        return y

    def conv_backward(
        self, pattern: Pattern, shape: ConvShape, values: Tensor, x: Tensor, g: Tensor, *, input: bool, bias: bool
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Return the gradients of input (or None), values and bias (or None) of a convolution.

        Args:
            pattern: As for `conv_forward`.
            shape: Sizes of the convolution.
            values: Values in column order, ``[nnz]``.
            x: ``[batch, in, height, width]``, contiguous.
            g: Gradient of the output, contiguous.
            input: Whether to compute the gradient of the input.
            bias: Whether to compute the gradient of the bias.

        Raises:
            MemoryError: There is no memory for scratch.
        """
        gx = torch.empty_like(x) if input else None
        gv = torch.empty_like(values)
        gb = torch.empty(pattern.rows, dtype=x.dtype) if bias else None
        failed = self._conv_backward(
            x.dtype is torch.float64, pattern.wide, shape.address, *pattern.by_column[:2], values.data_ptr(), x.data_ptr(), g.data_ptr(),
            None if gx is None else gx.data_ptr(), gv.data_ptr(), None if gb is None else gb.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the scratch of a convolution")
        return gx, gv, gb

    def chain(self, layers: Sequence[ChainLayer]) -> CompiledChain:
        """Prepare forward passes through ``layers``. Their tensors must not be resized or moved while it is in use."""
        return CompiledChain(self._library, layers)

    def layer(self, layer: ChainLayer) -> CompiledLayer:
        """Prepare forward passes through one sparse layer. See `chain`."""
        return CompiledLayer(self._library, layer)

    def planes(self, layer: ChainLayer, *sizes: tuple[int, int]) -> ConvPlanes:
        """Prepare convolutions of a single image; ``sizes`` are kernel, stride, padding and dilation. See `chain`."""
        return ConvPlanes(self._library, layer, *sizes)

    def top_k(self, k: int, dtype: torch.dtype, key: int) -> NativeTopK:
        """Return an empty running top-k for tiles of ``dtype``; ``key`` breaks ties."""
        return NativeTopK(self._library, k, dtype, key)


def _row_major(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


class NativeTopK:
    """A running top-k by absolute value over the tiles of a matrix. ``tie_order`` breaks ties."""

    def __init__(self, library: ctypes.CDLL, k: int, dtype: torch.dtype, key: int):
        self._library, self._k, self._double, self._key = library, k, dtype is torch.float64, key
        self._capacity = 2 * k + 4096
        self._values = torch.empty(self._capacity + 1, dtype=dtype)
        self._indices = torch.empty(self._capacity + 1, dtype=torch.int64)
        self._count, self._rank = c_int64(0), c_int64(0)
        self._threshold: c_double | c_float = c_double(-1.0) if self._double else c_float(-1.0)

    def update(self, tile: Tensor, base: int, exclude: Tensor) -> None:
        """Add the next tile.

        Args:
            tile: Contiguous. It is overwritten at the excluded positions.
            base: Flat index of the tile's first element. Must increase from tile to tile.
            exclude: Flat indices within the tile that may not be chosen, int64.
        """
        self._library.dst_grow_update(
            self._double, tile.data_ptr(), tile.numel(), base, exclude.data_ptr(), exclude.numel(), self._k,
            self._capacity, self._key, self._values.data_ptr(), self._indices.data_ptr(),
            ctypes.addressof(self._count), ctypes.addressof(self._threshold), ctypes.addressof(self._rank),
        )  # fmt: skip

    def finish(self) -> Tensor:
        """Return the flat indices of the top k, sorted, int64 ``[<= k]``."""
        count = ctypes.addressof(self._count)
        self._library.dst_grow_finish(
            self._double, self._k, self._key, self._values.data_ptr(), self._indices.data_ptr(), count
        )  # fmt: skip
        return self._indices[: self._count.value].clone()
