"""Models with gated recurrent units (Cho et al. 2014), by ``torch.nn.GRU``.

``weight_ih_l0`` and ``weight_hh_l0`` stack three gates: reset, update and new. Each is one sparse layer with one budget, so
connections can move between gates, which helps recurrent networks (Liu et al. 2021, "Selfish Sparse RNN Training", section
3).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dst.errors import ConfigurationError
from dst.models.common import check_positive, check_task, scaled


class GRUClassifier(nn.Module):
    """Reads an image row by row and classifies the last state.

    Args:
        input_shape: Shape (C, H, W) of one image: a sequence of H rows of C·W values.
        num_classes: Number of classes, at least 2.
        width: Units of every recurrent layer.
        depth: Number of recurrent layers.
        width_factor: Multiplies ``width``; see `dst.models.narrow`.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, width: int = 128, depth: int = 1, width_factor: float = 1.0
    ) -> None:
        super().__init__()
        (channels, _, image_width), num_classes = check_task(input_shape, num_classes)
        check_positive(width=width, depth=depth)
        width = scaled(width, width_factor)
        self.recurrent = nn.GRU(channels * image_width, width, depth, batch_first=True)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, num_classes)."""
        rows = images.transpose(1, 2).flatten(2)
        states, _ = self.recurrent(rows)
        return self.classifier(states[:, -1])


class GRUCharModel(nn.Module):
    """A recurrent model of text: embedding, GRU, linear head. Each sequence starts from a state of zeros.

    Args:
        vocab_size: Number of different tokens, at least 2.
        context: Length of the training sequences; the model accepts any length.
        width: Units of every recurrent layer, and features of a token.
        depth: Number of recurrent layers.
        width_factor: Multiplies ``width``; see `dst.models.narrow`.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    def __init__(
        self, vocab_size: int, context: int, width: int = 256, depth: int = 1, width_factor: float = 1.0
    ) -> None:
        super().__init__()
        check_positive(vocab_size=vocab_size, context=context, width=width, depth=depth)
        if vocab_size < 2:
            raise ConfigurationError(f"vocab_size must be at least 2, got {vocab_size}")
        width = scaled(width, width_factor)
        self.tokens = nn.Embedding(vocab_size, width)
        self.recurrent = nn.GRU(width, width, depth, batch_first=True)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (N, T), int64, to logits of the next tokens (N, T, vocab_size)."""
        states, _ = self.recurrent(self.tokens(tokens))
        return self.head(states)
