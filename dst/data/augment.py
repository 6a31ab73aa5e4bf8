"""Augmentation of whole batches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def crop_and_flip(images: Tensor, uniform: Tensor, padding: int = 4) -> Tensor:
    """Shift each image by up to ``padding`` pixels over a black border, and mirror half of them.

    This is the usual augmentation of CIFAR (He et al. 2016, section 4.2): a random crop of the padded image, then a random
    horizontal flip.

    Args:
        images: ``(B, C, H, W)``, any dtype.
        uniform: ``(B, 3)`` in [0, 1): the vertical offset, the horizontal offset and the flip of each image.
        padding: Border on each side, in pixels.

    Returns:
        A new tensor of the shape and dtype of ``images``.
    """
    batch, channels, height, width = images.shape
    offsets = (uniform[:, :2] * (2 * padding + 1)).long()
    rows = offsets[:, 0, None] + torch.arange(height)
    columns = offsets[:, 1, None] + torch.arange(width)
    columns = torch.where(uniform[:, 2, None] < 0.5, columns.flip(1), columns)
    pixels = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    padded = pad(images, [padding] * 4).flatten(2)
    return padded.gather(2, pixels.view(batch, 1, -1).expand(-1, channels, -1)).view(images.shape)
