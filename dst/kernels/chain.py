"""A chain of layers in one call of the compiled kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from dst.kernels.pattern import Pattern

_threads = torch.get_num_threads


class ChainLayer(NamedTuple):
    """One layer of a `CompiledChain`, sparse or dense: ``W x + bias``, then ReLU if ``relu``.

    Attributes:
        rows: Output features.
        columns: Input features.
        pattern: Positions of the non-zeros; None for a dense layer.
        values: For a sparse layer the values in row order, ``[nnz]``; for a dense one the weight, ``[rows, columns]``.
        bias: ``[rows]`` or None. All tensors are contiguous, detached and of one dtype, float32 or float64.
        relu: Whether to apply ReLU.
    """

    rows: int
    columns: int
    pattern: Pattern | None
    values: Tensor
    bias: Tensor | None
    relu: bool


class _LayerFields(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("sparse", "wide", "rows", "columns", "relu")),
        *((name, c_void_p) for name in ("pointers", "indices", "values", "bias")),
    )


class _ChainFields(ctypes.Structure):
    _fields_ = (("is_double", c_int64), ("count", c_int64), ("layers", c_void_p))


def _fields(layer: ChainLayer) -> _LayerFields:
    pattern = layer.pattern
    return _LayerFields(
        pattern is not None, pattern is not None and pattern.wide, layer.rows, layer.columns, layer.relu,
        None if pattern is None else pattern.row_pointers.data_ptr(),
        None if pattern is None else pattern.column_indices.data_ptr(),
        layer.values.data_ptr(), None if layer.bias is None else layer.bias.data_ptr(),
    )  # fmt: skip


class CompiledChain:
    """The forward pass through a chain of layers in one call of the kernels.

    Every run reads weights and biases in place, so in-place changes take effect. Values in row order are a copy, which the
    caller refreshes.

    Args:
        library: The compiled kernels.
        layers: At least one layer; the outputs of each are the inputs of the next.
    """

    def __init__(self, library: ctypes.CDLL, layers: Sequence[ChainLayer]):
        # Keeps the memory alive, even if a parameter gets other storage.
        self._keep = tuple(layers)
        self._dtype = layers[0].values.dtype
        self._columns, self._rows = layers[0].columns, layers[-1].rows
        self._fields = (_LayerFields * len(layers))(*map(_fields, layers))
        self._chain = _ChainFields(self._dtype is torch.float64, len(layers), ctypes.addressof(self._fields))
        self._address = ctypes.addressof(self._chain)
        self._call = library.dst_run_chain

    def run(self, x: Tensor) -> Tensor | None:
        """Return the output ``[batch, rows]``, strides ``(1, batch)``.

        Args:
            x: ``[batch, columns]``, any strides.

        Returns:
            The output, or None if the chain does not support the shape, dtype or device of ``x``.

        Raises:
            MemoryError: There is no memory for the activations.
        """
        # At batch size 1 with cold caches every call of a torch function costs microseconds, so this method makes few.
        if type(x) is not Tensor or x.dtype is not self._dtype or not x.is_cpu:
            return None
        shape = x.shape
        if len(shape) != 2 or shape[1] != self._columns:
            return None
        batch, columns = shape
        stride, across = x.stride()
        batch_major = 1
        if across != 1:
            if stride == 1 and across >= batch > 1:
                stride, batch_major = across, 0
            else:
                x, stride = x.contiguous(), columns
        y = x.new_empty_strided((batch, self._rows), (1, batch or 1))
        if self._call(self._address, x.data_ptr(), stride, batch_major, batch, y.data_ptr(), _threads()):
            raise MemoryError(f"no memory for the activations of {batch} examples")
        return y
