"""One linear layer, evaluated with arguments of the kernels that are prepared once."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dst.kernels.chain import ChainLayer, CompiledChain

_threads = torch.get_num_threads
_GELU = 2


class CompiledLayer:
    """The forward pass through one sparse layer, for any number of examples.

    At the sizes of one image or sentence, preparing a call takes longer than computing it, so here all but the input is
    prepared. Weights and bias are read in place, as in `CompiledChain`.

    Args:
        library: The compiled kernels.
        layer: A sparse layer.
    """

    def __init__(self, library: ctypes.CDLL, layer: ChainLayer):
        assert layer.pattern is not None
        self._single = CompiledChain(library, [layer])
        self._dtype, self._rows, self._columns = layer.values.dtype, layer.rows, layer.columns
        self._activation = int(layer.relu)
        pattern = layer.pattern
        self._prepared = (
            self._dtype is torch.float64, pattern.wide, layer.rows, layer.columns, pattern.row_pointers.data_ptr(),
            pattern.column_indices.data_ptr(), layer.values.data_ptr(),
        )  # fmt: skip
        self._bias = None if layer.bias is None else layer.bias.data_ptr()
        self._call = library.dst_rows_forward

    def run(self, x: Tensor, gelu: bool = False) -> Tensor | None:
        """Return the output ``[*, rows]``, contiguous.

        Args:
            x: ``[*, columns]``, any strides.
            gelu: Whether to apply GELU.

        Returns:
            The output, or None if the shape, dtype or device of ``x`` is not supported.

        Raises:
            MemoryError: There is no memory for scratch.
        """
        if type(x) is not Tensor or x.dtype is not self._dtype or not x.is_cpu:
            return None
        shape, columns, rows = x.shape, self._columns, self._rows
        size = x.numel()
        if size == columns and not gelu:
            return self._single.run(x)
        if not size or shape[-1] != columns:
            return None
        if not x.is_contiguous():
            x = x.contiguous()
        y = x.new_empty((*shape[:-1], rows))
        if self._call(
            *self._prepared, x.data_ptr(), columns, y.data_ptr(), rows, size // columns, self._bias,
            _GELU if gelu else self._activation, None, _threads(),
        ):  # fmt: skip
            raise MemoryError(f"no memory for the scratch of a {rows}x{columns} layer")
        return y
