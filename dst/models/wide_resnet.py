"""Wide residual networks: Zagoruyko & Komodakis 2016, "Wide Residual Networks"."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dst.errors import ConfigurationError
from dst.models.common import check_positive, check_task, he_init, scaled


class _PreActivationBlock(nn.Module):
    """BN-ReLU-conv twice with dropout between, and a 1x1 projection of the activated input if the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.projection = (
            nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False)
            if channels_in != channels or stride != 1  # at the smallest width_factor, all stages have one channel
            else None
        )

    def forward(self, inputs: Tensor) -> Tensor:
        activated = self.bn1(inputs).relu()
        shortcut = inputs if self.projection is None else self.projection(activated)
        features = self.bn2(self.conv1(activated)).relu()
        return self.conv2(self.dropout(features)) + shortcut


class WideResNet(nn.Module):
    """Pre-activation WRN-``depth``-``widen_factor`` with a 16-channel stem and 3 stages of (depth - 4)/6 blocks.

    Args:
        input_shape: Shape (C, H, W) of one image, H and W at least 4.
        num_classes: Number of classes, at least 2.
        depth: 6n + 4 for n blocks per stage.
        widen_factor: Multiplies the stages' 16, 32 and 64 channels.
        dropout: Probability in [0, 1) of dropping an activation between a block's two convolutions.
        width_factor: Multiplies the channels of the stem and of every stage; see `dst.models.narrow`.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        depth: int = 22,
        widen_factor: int = 2,
        dropout: float = 0.0,
        width_factor: float = 1.0,
    ) -> None:
        super().__init__()
        (channels, _, _), num_classes = check_task(input_shape, num_classes, min_size=4)
        check_positive(depth=depth, widen_factor=widen_factor)
        if depth < 10 or (depth - 4) % 6:
            raise ConfigurationError(f"depth must be 6n + 4 with n >= 1 (10, 16, 22, 28, …), got {depth}")
        if not 0.0 <= dropout < 1.0:
            raise ConfigurationError(f"dropout must lie in [0, 1), got {dropout!r}")
        blocks, stem = (depth - 4) // 6, scaled(16, width_factor)
        widths = [scaled(times * widen_factor, width_factor) for times in (16, 32, 64)]
        self.conv = nn.Conv2d(channels, stem, 3, padding=1, bias=False)
        self.stage1 = _stage(stem, widths[0], 1, blocks, dropout)
        self.stage2 = _stage(widths[0], widths[1], 2, blocks, dropout)
        self.stage3 = _stage(widths[1], widths[2], 2, blocks, dropout)
        self.bn = nn.BatchNorm2d(widths[2])
        self.classifier = nn.Linear(widths[2], num_classes)
        he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        features = self.stage3(self.stage2(self.stage1(self.conv(images))))
        return self.classifier(self.bn(features).relu().mean((2, 3)))


class WRN22_2(WideResNet):
    """WRN-22-2 without dropout, RigL's network for CIFAR: 1,076,912 conv and linear weights for CIFAR-10.

    Args:
        input_shape: Shape (C, H, W) of one image, H and W at least 4.
        num_classes: Number of classes, at least 2.
        width_factor: Multiplies the channels of the stem and of every stage; see `dst.models.narrow`.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, width_factor: float = 1.0) -> None:
        super().__init__(input_shape, num_classes, depth=22, widen_factor=2, width_factor=width_factor)


def _stage(channels_in: int, channels: int, stride: int, blocks: int, dropout: float) -> nn.Sequential:
    first = _PreActivationBlock(channels_in, channels, stride, dropout)
    rest = (_PreActivationBlock(channels, channels, 1, dropout) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)
