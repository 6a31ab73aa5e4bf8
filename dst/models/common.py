"""Functions for all models: checks of arguments, scaled widths, He initialisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from dst.errors import ConfigurationError


def check_positive(**sizes: int) -> None:
    """Raise ConfigurationError naming the first of ``sizes`` that is not an integer of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigurationError(f"{name} must be an integer of at least 1, got {size!r}")


def check_task(input_shape: Sequence[int], num_classes: int, min_size: int = 1) -> tuple[tuple[int, int, int], int]:
    """Check the two arguments of every image model.

    Args:
        input_shape: Shape (C, H, W) of one image; any sequence of three integers.
        num_classes: Number of classes, at least 2.
        min_size: Smallest height and width the architecture can take.

    Returns:
        ``input_shape`` as a plain tuple, and ``num_classes``.

    Raises:
        ConfigurationError: The shape is not three positive integers, the image is smaller than ``min_size``, or there are
            fewer than two classes.
    """
    if isinstance(input_shape, (int, str)) or len(input_shape) != 3:
        raise ConfigurationError(f"input_shape must be (channels, height, width), three integers, got {input_shape!r}")
    channels, height, width = input_shape
    check_positive(**{"input_shape channels": channels, "input_shape height": height, "input_shape width": width})
    if min(height, width) < min_size:
        raise ConfigurationError(
            f"input_shape {tuple(input_shape)} is too small: this model needs images of at least "
            f"{min_size}x{min_size}; choose another model or enlarge the images"
        )
    check_positive(num_classes=num_classes)
    if num_classes < 2:
        raise ConfigurationError(f"num_classes must be at least 2, got {num_classes}")
    return (channels, height, width), num_classes


def scaled(width: int, factor: float, multiple_of: int = 1) -> int:
    """Scale a width to the multiple of ``multiple_of`` nearest to ``width * factor``, and at least ``multiple_of``.

    Ties round up. The result never decreases with ``factor``. At 1, a width that is such a multiple stays.

    Raises:
        ConfigurationError: The factor is not a positive number.
    """
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
        raise ConfigurationError(f"width_factor must be a positive number, got {factor!r}")
    return max(1, math.floor(width * factor / multiple_of + 0.5)) * multiple_of


def he_init(model: nn.Module) -> None:
    """Initialise ``model`` in place: He-normal (fan-in) weights of linear and conv layers, zero biases.

    Source: He et al. 2015, "Delving Deep into Rectifiers", equation 10.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
