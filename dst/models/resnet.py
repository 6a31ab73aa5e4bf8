"""The CIFAR residual network of He et al. 2016, "Deep Residual Learning", section 4.2."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from dst.models.common import check_positive, check_task, he_init, scaled


class _BasicBlock(nn.Module):
    """Two 3x3 conv-BN with ReLU and a parameter-free shortcut.

    If the shape changes, the shortcut takes every ``stride``-th pixel and appends zero channels ("option A" of the paper), so
    all weights are on the residual path.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - channels_in

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.bn1(self.conv1(inputs)).relu()
        features = self.bn2(self.conv2(features))
        shortcut = inputs[:, :, :: self.stride, :: self.stride]
        before = self.new_channels // 2
        shortcut = functional.pad(shortcut, (0, 0, 0, 0, before, self.new_channels - before))
        return (features + shortcut).relu()


class ResNet20(nn.Module):
    """CIFAR ResNet-20: a 3x3 stem, then 3 stages of 3 basic blocks with w, 2w and 4w channels.

    Shortcuts are parameter-free (option A), so CIFAR-10 at w = 16 has 269,722 parameters.

    Args:
        input_shape: Shape (C, H, W) of one image, H and W at least 4.
        num_classes: Number of classes, at least 2.
        width: Channels w of the stem and the first stage.
        width_factor: Multiplies the channels of every stage; see `dst.models.narrow`.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, width: int = 16, width_factor: float = 1.0
    ) -> None:
        super().__init__()
        (channels, _, _), num_classes = check_task(input_shape, num_classes, min_size=4)
        check_positive(width=width)
        widths = [scaled(times * width, width_factor) for times in (1, 2, 4)]
        self.conv = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.stage1 = _stage(widths[0], widths[0], stride=1)
        self.stage2 = _stage(widths[0], widths[1], stride=2)
        self.stage3 = _stage(widths[1], widths[2], stride=2)
        self.classifier = nn.Linear(widths[2], num_classes)
        he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        features = self.bn(self.conv(images)).relu()
        features = self.stage3(self.stage2(self.stage1(features)))
        return self.classifier(features.mean((2, 3)))


def _stage(channels_in: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        _BasicBlock(channels_in, channels, stride),
        _BasicBlock(channels, channels, 1),
        _BasicBlock(channels, channels, 1),
    )
