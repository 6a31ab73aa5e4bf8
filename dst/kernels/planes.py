"""The convolution of a single image as a product with shifted planes.

The convolution kernels put one image into each lane of a vector, so with a single image most of their work is arranging lanes.
Here the image is padded and, with a stride, split into one plane per remainder. A tap (channel, row, column of the kernel) is
then a vector of all outputs that starts at an offset into the planes. The convolution is the product of a sparse matrix with
these overlapping vectors, in the kernel of linear layers.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dst.kernels.chain import ChainLayer
from dst.kernels.geometry import ConvShape

_threads = torch.get_num_threads
_pad = torch.constant_pad_nd


class ConvPlanes:
    """A convolution without groups of a single image.

    Weights and bias are read in place, as in `CompiledChain`. Results do not depend on the number of threads. Several threads
    may share the object.

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
        self._layer, self._dtype, self._geometry = layer, layer.values.dtype, (kernel, stride, padding, dilation)
        self._call = library.dst_forward
        self._planes: _Planes | None = None

    def run(self, x: Tensor, gelu: bool = False) -> Tensor | None:
        """Convolve an image.

        Args:
            x: ``[1, in, height, width]``, any strides.
            gelu: Not supported.

        Returns:
            ``[1, out, out height, out width]``, contiguous, or None for other inputs and for images that 32-bit offsets do not
            reach.

        Raises:
            ValueError: The kernel is larger than the padded image.
        """
        if gelu or type(x) is not Tensor or x.dtype is not self._dtype or not x.is_cpu:
            return None
        planes = self._planes  # another thread may replace it
        if planes is None or planes.image != x.shape:
            planes = self._place(x.shape)
            if planes is None:
                return None
            self._planes = planes
        if planes.padding is not None:
            x = _pad(x, planes.padding)
        if planes.phases is not None:
            x = x.reshape(planes.phases).permute(2, 4, 0, 1, 3).contiguous()
        elif not x.is_contiguous():
            x = x.contiguous()
        y = x.new_empty(planes.output)
        self._call(*planes.weight, x.data_ptr(), 1, y.data_ptr(), *planes.outputs, _threads())
        return y if planes.width is None else y[..., : planes.width].contiguous()

    def _place(self, image: torch.Size) -> _Planes | None:
        """Offsets and sizes for images of a shape. None if it is not supported."""
        layer, (kernel, stride, padding, dilation) = self._layer, self._geometry
        channels = layer.columns // (kernel[0] * kernel[1])
        if len(image) != 4 or image[:2] != (1, channels) or layer.pattern is None:
            return None
        _, _, height, width = ConvShape(image, layer.rows, *self._geometry).output
        padded = [n + 2 * p for n, p in zip(image[2:], padding, strict=True)]
        # Zeros at the end complete the planes.
        down, across = (-(-n // s) for n, s in zip(padded, stride, strict=True))
        if down * across * channels * stride[0] * stride[1] >= 1 << 31:
            return None
        bottom, right = down * stride[0] - padded[0] + padding[0], across * stride[1] - padded[1] + padding[1]
        zeros = [padding[1], right, padding[0], bottom]
        columns = layer.pattern.column_indices.to(torch.int64)
        row = columns // kernel[1] % kernel[0] * dilation[0]
        column = columns % kernel[1] * dilation[1]
        plane = (row % stride[0] * stride[1] + column % stride[1]) * channels + columns // (kernel[0] * kernel[1])
        offsets = ((plane * down + row // stride[0]) * across + column // stride[1]).to(torch.int32)
        return _Planes(
            image,
            zeros if any(zeros) else None,
            None if stride == (1, 1) else (channels, down, stride[0], across, stride[1]),
            (1, layer.rows, height, across),
            None if width == across else width,
            offsets,
            (
                self._dtype is torch.float64, True, layer.rows, layer.columns, layer.pattern.row_pointers.data_ptr(),
                offsets.data_ptr(), layer.values.data_ptr(),
            ),
            (
                height * across, (height - 1) * across + width,
                None if layer.bias is None else layer.bias.data_ptr(), layer.relu,
            ),
        )  # fmt: skip


class _Planes(NamedTuple):
    """What depends on the shape of the image.

    Attributes:
        image: Shape of the image.
        padding: Zeros at the left, right, top and bottom, or None.
        phases: Shape of the padded image with rows and columns split by the stride, or None without a stride.
        output: Shape of the output with rows as long as those of a plane.
        width: Columns of the output, or None if it has those of a plane.
        offsets: Offset of each non-zero's tap into the planes, in row order, int32 ``[nnz]``.
        weight: Arguments of the kernel before the planes.
        outputs: Arguments of the kernel after the output.
    """

    image: torch.Size
    padding: list[int] | None
    phases: tuple[int, ...] | None
    output: tuple[int, ...]
    width: int | None
    offsets: Tensor
    weight: tuple[Any, ...]
    outputs: tuple[Any, ...]
