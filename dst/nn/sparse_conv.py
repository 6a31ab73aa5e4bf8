"""A convolution that stores, trains and saves only its non-zero weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from dst.kernels import ChainLayer, ConvPlanes, Kernels
from dst.nn import passes
from dst.nn.dense_conversion import filled
from dst.nn.passes import Operators
from dst.nn.sparse_linear import SparseLinear


class SparseConv2d(SparseLinear):
    """A 2-D convolution without groups, storing only the non-zeros of its weight ``[out, in, height, width]``.

    The weight is stored as a matrix ``[out, in * height * width]``. Images and outputs are ordinary contiguous tensors.
    Each image is copied into padded planes, so that a non-zero multiplies contiguous vectors of an input plane. In evaluation
    a single image takes a faster path (`dst.kernels.ConvPlanes`), which sums in another order.

    Args:
        in_channels: Channels of an input.
        out_channels: Channels of an output.
        indices: Row-major flat positions in the weight: int64, sorted, distinct.
        values: As in `SparseLinear`.
        kernel_size: Height and width of the kernel.
        stride: Step between output positions, down and across.
        padding: Zeros added at both sides, in height and width.
        dilation: Step between the taps of a kernel, down and across.
        **options: Passed to `SparseLinear`.

    Shape:
        - Input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``.
        - Output: As for ``nn.Conv2d``.
    """

    # Defaults for layers that were pickled when only 1×1 kernels were supported.
    kernel_size: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        indices: Tensor,
        values: Tensor | None = None,
        *,
        kernel_size: tuple[int, int] = (1, 1),
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        **options: Any,
    ):
        height, width = kernel_size
        super().__init__(in_channels * height * width, out_channels, indices, values, **options)
        self.kernel_size = height, width
        self.stride, self.padding, self.dilation = stride, padding, dilation

    @property
    def in_channels(self) -> int:
        """Channels of an input."""
        return self.in_features // (self.kernel_size[0] * self.kernel_size[1])

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape ``(out_channels, in_channels, height, width)`` of the dense weight."""
        return self.out_features, self.in_channels, *self.kernel_size

    def mask(self) -> Tensor:
        """Return the bool mask of the weight's shape."""
        return super().mask().view(self.shape)

    def to_dense(self, entries: Tensor) -> Tensor:
        """Scatter one entry per non-zero into a tensor of the weight's shape, zeros elsewhere."""
        return super().to_dense(entries).view(self.shape)

    def to_conv(self) -> nn.Conv2d:
        """Return an ``nn.Conv2d`` with the same weights and bias, without a fused ReLU."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_features,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=self.bias is not None,
            dtype=self.values.dtype,
        )
        return filled(conv, self)

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return (
            f"{super().extra_repr()}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}"
        )

    def _check_input(self, x: Tensor) -> None:
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"the input is {tuple(x.shape)}; this layer takes (N, {self.in_channels}, H, W) or "
                f"({self.in_channels}, H, W)"
            )

    def _compute(self, x: Tensor, values: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        if x.dim() == 3:
            return passes.apply(self, x.unsqueeze(0).contiguous(), values, bias, False).squeeze(0)
        return passes.apply(self, x.contiguous(), values, bias, False)

    def _operators(self) -> Operators:
        sizes = self.kernel_size, self.stride, self.padding, self.dilation
        return Operators("sparse_conv2d", self._pattern, sizes, self.relu)

    @staticmethod
    def _pair(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return x, g

    def _product(self, x: Tensor, g: Tensor, first: int, last: int, tile: Tensor, add: bool) -> None:
        shape = (last - first, *self.shape[1:])
        gradient = conv2d_weight(x, shape, g[:, first:last], self.stride, self.padding, self.dilation)
        gradient = gradient.view(tile.shape)
        tile.add_(gradient) if add else tile.copy_(gradient)

    def _bypasses(self, x: Tensor) -> bool:
        return x.shape[0] == 1 and super()._bypasses(x)

    def _compiled(self, kernels: Kernels, layer: ChainLayer) -> ConvPlanes:
        return kernels.planes(layer, self.kernel_size, self.stride, self.padding, self.dilation)
