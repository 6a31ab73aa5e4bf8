"""Vision transformers for small images: Dosovitskiy et al. 2021, Touvron et al. 2021 (DeiT)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dst.errors import ConfigurationError
from dst.models.common import check_positive, check_task, scaled
from dst.models.transformer import Attention, Block, check_transformer, init_transformer
from dst.nn import FeedForward

_PATCHES = 4, 2, 1
_FEWEST = 16  # patches of an image: with fewer, attention has little effect


class ViTTiny(nn.Module):
    """A vision transformer with the width, depth and heads of DeiT-Tiny, and patches for small images.

    It consists of a linear embedding of patches, learned positions, pre-norm blocks, a norm, the mean over patches and a
    linear classifier. The mean replaces DeiT's class token (Beyer et al. 2022, "Better plain ViT baselines for
    ImageNet-1k"). The learned positions are an embedding and stay dense.

    Args:
        input_shape: Shape (C, H, W) of one image.
        num_classes: Number of classes, at least 2.
        patch: Side of the square patches, a divisor of H and W. By default the largest of 4, 2 and 1 that divides an image
            into at least 16 patches (4 for 28x28 and 32x32, 2 for 8x8), or 1 if none does.
        width: Features of a token, a multiple of ``heads``.
        depth: Number of blocks.
        heads: Attention heads of a block.
        mlp_ratio: Features within the feed-forward network, as a multiple of ``width``.
        dropout: Probability in [0, 1) of dropping attention weights and outputs of blocks' branches.
        width_factor: Multiplies ``width``, rounded to a multiple of ``heads``, and the features within the feed-forward
            networks; see `dst.models.narrow`.

    Raises:
        ConfigurationError: An argument is out of range, or the patch does not fit the images.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        patch: int | None = None,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        width_factor: float = 1.0,
    ) -> None:
        super().__init__()
        (channels, height, image_width), num_classes = check_task(input_shape, num_classes)
        check_transformer(width=width, depth=depth, heads=heads, mlp_ratio=mlp_ratio, dropout=dropout)
        patch = _default_patch(height, image_width) if patch is None else patch
        check_positive(patch=patch)
        if height % patch or image_width % patch:
            raise ConfigurationError(
                f"patch={patch} does not divide images of {height}x{image_width} evenly: choose another, or null "
                "for one that does"
            )
        width, hidden = scaled(width, width_factor, heads), scaled(mlp_ratio * width, width_factor)
        self.patch = patch
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Embedding((height // patch) * (image_width // patch), width)
        self.blocks = nn.Sequential(
            *(
                Block(
                    width,
                    Attention(width, heads, causal=False, dropout=dropout),
                    FeedForward(width, hidden),
                    dropout=dropout,
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)
        init_transformer(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        tokens = self.blocks(tokens + self.positions(places))
        return self.classifier(self.norm(tokens).mean(1))


def _default_patch(height: int, width: int) -> int:
    fitting = (p for p in _PATCHES if not height % p and not width % p and (height // p) * (width // p) >= _FEWEST)
    return next(fitting, 1)
