"""A small convolutional network for quick runs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dst.models.common import check_positive, check_task, he_init, scaled
from dst.nn import ActivationFactory, relu


class ConvNet(nn.Module):
    """Three 3x3 conv-BN-ReLU blocks of w, 2w and 4w channels with 2x2 max pooling between, and a linear classifier.

    Global average pooling before the classifier makes the number of weights independent of the image size: 94,304 for 3
    channels and 10 classes.

    Args:
        input_shape: Shape (C, H, W) of one image, H and W at least 4.
        num_classes: Number of classes, at least 2.
        width: Channels w of the first block.
        activation: Builds a block's activation from its number of channels; see `dst.nn.activations`.
        width_factor: Multiplies the channels of every block; see `dst.models.narrow`.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        width: int = 32,
        activation: ActivationFactory = relu,
        width_factor: float = 1.0,
    ) -> None:
        super().__init__()
        (channels, _, _), num_classes = check_task(input_shape, num_classes, min_size=4)
        check_positive(width=width)
        widths = [scaled(times * width, width_factor) for times in (1, 2, 4)]
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.conv2 = nn.Conv2d(widths[0], widths[1], 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(widths[1])
        self.conv3 = nn.Conv2d(widths[1], widths[2], 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(widths[2])
        self.activations = nn.ModuleList(activation(channels) for channels in widths)
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Linear(widths[2], num_classes)
        he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        first, second, third = self.activations
        features = self.pool(first(self.bn1(self.conv1(images))))
        features = self.pool(second(self.bn2(self.conv2(features))))
        features = third(self.bn3(self.conv3(features)))
        return self.classifier(features.mean((2, 3)))
