"""Fully connected classifiers on flattened images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import Tensor, nn

from dst.models.common import check_positive, check_task, he_init, scaled
from dst.nn import ActivationFactory, relu


class _FullyConnected(nn.Module):
    """Flattening, linear layers of the scaled ``widths`` with activations, and a linear classifier."""

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        widths: Sequence[int],
        activation: ActivationFactory,
        width_factor: float,
    ) -> None:
        super().__init__()
        shape, num_classes = check_task(input_shape, num_classes)
        widths = [scaled(width, width_factor) for width in widths]
        sizes = [prod(shape), *widths]
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.activations = nn.ModuleList(activation(width) for width in widths)
        self.classifier = nn.Linear(sizes[-1], num_classes)
        he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        features = images.flatten(1)
        for layer, activation in zip(self.hidden, self.activations, strict=True):
            features = activation(layer(features))
        return self.classifier(features)


class LeNet300100(_FullyConnected):
    """LeNet-300-100: two hidden layers of 300 and 100 units (LeCun et al. 1998).

    Args:
        input_shape: Shape (C, H, W) of one image.
        num_classes: Number of classes, at least 2.
        activation: Builds a hidden layer's activation from its number of units; see `dst.nn.activations`.
        width_factor: Multiplies the units of the hidden layers; see `dst.models.narrow`.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        activation: ActivationFactory = relu,
        width_factor: float = 1.0,
    ) -> None:
        super().__init__(input_shape, num_classes, (300, 100), activation, width_factor)


class MLP(_FullyConnected):
    """``depth`` hidden layers of ``width`` units, the network of SET's first experiments (Mocanu et al. 2018).

    Args:
        input_shape: Shape (C, H, W) of one image.
        num_classes: Number of classes, at least 2.
        width: Units of every hidden layer.
        depth: Number of hidden layers, without the classifier.
        activation: Builds a hidden layer's activation from its number of units; see `dst.nn.activations`.
        width_factor: Multiplies ``width``; see `dst.models.narrow`.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        width: int = 1000,
        depth: int = 3,
        activation: ActivationFactory = relu,
        width_factor: float = 1.0,
    ) -> None:
        check_positive(width=width, depth=depth)
        super().__init__(input_shape, num_classes, [width] * depth, activation, width_factor)
