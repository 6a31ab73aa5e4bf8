"""A pointwise convolution that stores, trains and saves only its non-zero weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dst.nn.sparse_linear import SparseLinear


class SparseConv2d(SparseLinear):
    """A 1×1 convolution where only the non-zeros of its weight ``[out, in, 1, 1]`` exist.

    It is a `SparseLinear` over channels, applied at every position of every image. Larger kernels are not supported:
    unfolding an image for them costs more than the non-zeros save.

    Args:
        in_channels: channels of an input.
        out_channels: channels of an output.
        indices: as for `SparseLinear`: row-major flat positions ``output * in_channels + input``.
        values: as for `SparseLinear`.
        stride: step between positions, down and across.
        **options: passed to `SparseLinear`.

    Shape:
        - Input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``.
        - Output: contiguous ``(N, out_channels, ceil(H / stride), ceil(W / stride))``, without ``N`` for an input without it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        indices: Tensor,
        values: Tensor | None = None,
        *,
        stride: tuple[int, int] = (1, 1),
        **options: Any,
    ):
        super().__init__(in_channels, out_channels, indices, values, **options)
        self.stride = stride

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape ``(out_channels, in_channels, 1, 1)`` of the weight that this layer stands for."""
        return self.out_features, self.in_features, 1, 1

    def mask(self) -> Tensor:
        """Return the bool mask ``[out_channels, in_channels, 1, 1]``."""
        return super().mask().view(self.shape)

    def to_dense(self, entries: Tensor) -> Tensor:
        """Spread one entry per position over ``[out_channels, in_channels, 1, 1]``, zeros elsewhere."""
        return super().to_dense(entries).view(self.shape)

    def to_conv(self) -> nn.Conv2d:
        """Return an ``nn.Conv2d`` with the same weights and bias; a fused ReLU is not part of it."""
        conv = nn.Conv2d(
            self.in_features, self.out_features, 1, self.stride, bias=self.bias is not None, dtype=self.values.dtype
        )
        with torch.no_grad():
            conv.weight.copy_(self.dense_weight())
            if self.bias is not None and conv.bias is not None:
                conv.bias.copy_(self.bias)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        """Describe the layer in its printed form."""
        return f"{super().extra_repr()}, stride={self.stride}"

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to images.

        Raises:
            ValueError: the input has other than 3 or 4 dimensions, or another number of channels.
        """
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_features:
            raise ValueError(
                f"the input is {tuple(x.shape)}; this layer takes (N, {self.in_features}, H, W) or "
                f"({self.in_features}, H, W)"
            )
        images = x[..., :: self.stride[0], :: self.stride[1]]
        images = images.unsqueeze(0) if x.dim() == 3 else images
        n, _, height, width = images.shape
        # Channels by positions of all images: the feature-major storage that the kernels read without a copy.
        y = super().forward(images.transpose(0, 1).reshape(self.in_features, n * height * width).t())
        y = y.t().view(self.out_features, n, height, width).transpose(0, 1).contiguous()
        return y.squeeze(0) if x.dim() == 3 else y
