"""A pointwise convolution that stores, trains and saves only its non-zero weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dst.nn.sparse_linear import SparseLinear


class SparseConv2d(SparseLinear):
    """A 1×1 convolution that stores only the non-zeros of its weight ``[out, in, 1, 1]``.

    A `SparseLinear` over channels is applied at every position. Larger kernels are not supported: unfolding the input for
    them costs more than the sparsity saves.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        indices: Row-major flat positions ``output * in_channels + input`` of the non-zeros; see `SparseLinear`.
        values: Values of the non-zeros; see `SparseLinear`.
        stride: Vertical and horizontal stride.
        **options: Passed to `SparseLinear`.

    Shape:
        - Input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``.
        - Output: ``(N, out_channels, ceil(H / stride), ceil(W / stride))``, contiguous; without ``N`` if the input has none.
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
        """Shape ``(out_channels, in_channels, 1, 1)`` of the dense weight."""
        return self.out_features, self.in_features, 1, 1

    def mask(self) -> Tensor:
        """Return the bool mask ``[out_channels, in_channels, 1, 1]``."""
        return super().mask().view(self.shape)

    def to_dense(self, entries: Tensor) -> Tensor:
        """Scatter one entry per non-zero into zeros of shape ``[out_channels, in_channels, 1, 1]``."""
        return super().to_dense(entries).view(self.shape)

    def to_conv(self) -> nn.Conv2d:
        """Return an ``nn.Conv2d`` with the same weights and bias, without a fused ReLU."""
        conv = nn.Conv2d(
            self.in_features, self.out_features, 1, self.stride, bias=self.bias is not None, dtype=self.values.dtype
        )
        with torch.no_grad():
            conv.weight.copy_(self.dense_weight())
            if self.bias is not None and conv.bias is not None:
                conv.bias.copy_(self.bias)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return f"{super().extra_repr()}, stride={self.stride}"

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to images.

        Raises:
            ValueError: The input does not have 3 or 4 dimensions, or has another number of channels.
        """
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_features:
            raise ValueError(
                f"the input is {tuple(x.shape)}; this layer takes (N, {self.in_features}, H, W) or "
                f"({self.in_features}, H, W)"
            )
        images = x[..., :: self.stride[0], :: self.stride[1]]
        images = images.unsqueeze(0) if x.dim() == 3 else images
        n, _, height, width = images.shape
        # [channels, positions of all images] is the feature-major layout, which the kernels read without a copy.
        y = super().forward(images.transpose(0, 1).reshape(self.in_features, n * height * width).t())
        y = y.t().view(self.out_features, n, height, width).transpose(0, 1).contiguous()
        return y.squeeze(0) if x.dim() == 3 else y
