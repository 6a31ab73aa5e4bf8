"""Convolutions of a few images as products with shifted planes.

The convolution kernels put one image into each lane of a vector, so with few images most of their work is arranging lanes.
Here an image is padded and, with a stride, split into one plane per remainder. A tap (channel, row, column of the kernel) is
then a vector of all outputs that starts at an offset into the planes. The convolution is the product of a sparse matrix with
these overlapping vectors, in the kernel of linear layers.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from dst.kernels.chain import ChainLayer
from dst.kernels.geometry import ConvShape

FEW_IMAGES = 2
"""The most images for which this is the faster way."""

_threads = torch.get_num_threads


class ConvPlanes:
    """A convolution without groups of a few images.

    Weights and bias are read in place, as in `CompiledChain`. Results do not depend on the numbers of threads and images.
    Several threads may share the object.

    Args:
        library: The compiled kernels.
        layer: The weight as a matrix ``[out, in * kernel height * kernel width]``.
        kernel: Height and width of the kernel.
        stride: Step between output positions, down and across.
        padding: Zeros added at both sides, in height and width.
        dilation: Step between the taps of the kernel, down and across.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        layer: ChainLayer,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ):
        assert layer.pattern is not None
        self._layer, self._dtype, self._pattern = layer, layer.values.dtype, layer.pattern
        self._kernel, self._stride, self._padding, self._dilation = kernel, stride, padding, dilation
        self._channels = layer.columns // (kernel[0] * kernel[1])
        self._call = library.dst_forward
        self._planes: _Planes | None = None

    def run(self, x: Tensor, gelu: bool = False) -> Tensor | None:
        """Convolve images.

        Args:
            x: ``[batch, in, height, width]``, any strides.
            gelu: Not supported.

        Returns:
            ``[batch, out, out height, out width]``, contiguous, or None for other inputs, for more than `FEW_IMAGES`, and for
            images that 32-bit offsets do not reach.

        Raises:
            ValueError: The kernel is larger than the padded images.
        """
        if gelu or type(x) is not Tensor or x.dtype is not self._dtype or not x.is_cpu:
            return None
        shape = x.shape
        if len(shape) != 4 or shape[1] != self._channels or not 0 < shape[0] <= FEW_IMAGES:
            return None
        planes = self._planes  # another thread may replace it
        if planes is None or planes.size != shape[2:]:
            planes = self._planes = self._placed(shape)
        if planes.elements >= 1 << 31:
            return None
        batch, layer, across = shape[0], self._layer, planes.across
        if planes.padding is not None:
            x = torch.constant_pad_nd(x, planes.padding)
        if self._stride != (1, 1):
            x = x.reshape(batch, self._channels, -1, self._stride[0], across, self._stride[1]).permute(0, 3, 5, 1, 2, 4)
        x = x.contiguous()
        y = x.new_empty((batch, layer.rows, planes.height, across))
        source, target, item = x.data_ptr(), y.data_ptr(), x.element_size()
        bias = None if layer.bias is None else layer.bias.data_ptr()
        for _ in range(batch):
            self._call(
                item == 8, True, layer.rows, layer.columns, planes.pointers, planes.indices, planes.values, source, 1,
                target, planes.height * across, planes.outputs, bias, layer.relu, _threads(),
            )  # fmt: skip
            source += item * planes.elements
            target += item * layer.rows * planes.height * across
        return y if planes.width == across else y[..., : planes.width].contiguous()

    def _placed(self, images: torch.Size) -> _Planes:
        """Offsets and sizes for images of a shape."""
        stride, pattern = self._stride, self._pattern
        shape = ConvShape(images, self._layer.rows, self._kernel, stride, self._padding, self._dilation)
        padded = [n + 2 * p for n, p in zip(images[2:], self._padding, strict=True)]
        # Zeros at the end complete the planes.
        down, across = (-(-n // s) for n, s in zip(padded, stride, strict=True))
        (top, left), rest = self._padding, (down * stride[0] - padded[0], across * stride[1] - padded[1])
        columns = pattern.column_indices.to(torch.int64)
        row = columns // self._kernel[1] % self._kernel[0] * self._dilation[0]
        column = columns % self._kernel[1] * self._dilation[1]
        plane = (row % stride[0] * stride[1] + column % stride[1]) * self._channels
        plane += columns // (self._kernel[0] * self._kernel[1])
        offsets = ((plane * down + row // stride[0]) * across + column // stride[1]).to(torch.int32)
        _, _, height, width = shape.output
        padding = [left, left + rest[1], top, top + rest[0]]
        return _Planes(
            images[2:], padding if any(padding) else None, across, down * across * self._channels * stride[0] * stride[1],
            height, width, (height - 1) * across + width, offsets, offsets.data_ptr(), pattern.row_pointers.data_ptr(),
            self._layer.values.data_ptr(),
        )  # fmt: skip


class _Planes(NamedTuple):
    """What depends on the size of the images.

    Attributes:
        size: Height and width of the images.
        padding: Zeros at the left, right, top and bottom, or None.
        across: Columns of a plane.
        elements: Elements of all planes of an image.
        height: Rows of the output.
        width: Columns of the output.
        outputs: Elements from the first to the last output of a channel, in rows of ``across``.
        offsets: Offset of each non-zero's tap into the planes, in row order, int32 ``[nnz]``.
        indices: Address of the offsets.
        pointers: Address of the pattern's row pointers.
        values: Address of the values in row order.
    """

    size: torch.Size
    padding: list[int] | None
    across: int
    elements: int
    height: int
    width: int
    outputs: int
    offsets: Tensor
    indices: int
    pointers: int
    values: int
