"""Sizes of a convolution as the compiled kernels take them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64


class ConvShape:
    """Sizes of a convolution without groups, in the order of ``dst_conv`` in ``conv.cpp``.

    Args:
        images: batch, channels, height and width of the input.
        outputs: channels of the output.
        kernel: height and width of the kernel.
        stride: step between positions, down and across.
        padding: zeros around the input, above and below, left and right.
        dilation: step between the taps of a kernel, down and across.

    Attributes:
        output: batch, channels, height and width of the output.
        address: where the sizes lie in memory; valid while this object lives.
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
        """Compute the output's sizes.

        Raises:
            ValueError: the kernel is larger than the padded input.
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
        sizes = (batch, channels, *size, outputs, *out, *kernel, *stride, *padding, *dilation)
        self._sizes = (c_int64 * len(sizes))(*sizes)
        self.address = ctypes.addressof(self._sizes)
