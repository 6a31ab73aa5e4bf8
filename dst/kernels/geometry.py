"""Sizes of a convolution as the compiled kernels take them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64


class ConvShape:
    """Sizes of a convolution without groups, in the order of ``dst_conv`` in ``conv.cpp``.

    Args:
        images: Batch size, channels, height and width of the input.
        outputs: Channels of the output.
        kernel: Height and width of the kernel.
        stride: Step between output positions, down and across.
        padding: Zeros added at both sides, in height and width.
        dilation: Step between the taps of the kernel, down and across.

    Attributes:
        weight: Shape of the weight, ``(outputs, channels, height, width)``.
        stride: As given.
        padding: As given.
        dilation: As given.
        output: Batch size, channels, height and width of the output.
        address: Address of the sizes in memory, valid during the lifetime of this object.
    """

    def __init__(
        self,
        images: Sequence[int],
        outputs: int,
        kernel: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
    ):
        """Compute the sizes of the output.

        Raises:
            ValueError: The kernel is larger than the padded input.
        """
        batch, channels, *size = images
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        spare = [n + 2 * p - r for n, p, r in zip(size, padding, reach, strict=True)]
        if min(spare) < 0:
            raise ValueError(
                f"a kernel that spans {tuple(reach)} does not fit an input of {tuple(size)} padded by {padding}"
            )
        out = [n // s + 1 for n, s in zip(spare, stride, strict=True)]
        self.output = (batch, outputs, *out)
        self.weight = (outputs, channels, *kernel)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        sizes = (batch, channels, *size, outputs, *out, *kernel, *stride, *padding, *dilation)
        self._sizes = (c_int64 * len(sizes))(*sizes)
        self.address = ctypes.addressof(self._sizes)
