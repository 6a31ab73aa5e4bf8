"""Parts of the transformers: attention by separate projections, pre-norm blocks, initialisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dst.errors import ConfigurationError
from dst.models.common import check_positive


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2) with separate linear layers for all projections.

    Query, key and value are not packed into one matrix, so each has its own sparsity and works with every backend.

    Args:
        width: Features of a token, a multiple of ``heads``.
        heads: Number of heads.
        causal: Each token attends only to itself and earlier tokens.
        dropout: Probability in [0, 1) of dropping an attention weight.
    """

    def __init__(self, width: int, heads: int, *, causal: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (N, T, width) to (N, T, width)."""
        query, key, value = (
            project(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0, is_causal=self.causal
        )
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm block: attention, then a feed-forward network, each after a norm and with a residual connection.

    Args:
        width: Features of a token.
        attention: Maps tokens (N, T, width) to the same shape.
        feed_forward: Maps tokens (N, T, width) to the same shape.
        dropout: Probability in [0, 1) of dropping outputs of both branches.
    """

    def __init__(self, width: int, attention: nn.Module, feed_forward: nn.Module, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = attention
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (N, T, width) to (N, T, width)."""
        tokens = tokens + self.dropout(self.attention(self.norm1(tokens)))
        return tokens + self.dropout(self.feed_forward(self.norm2(tokens)))


def check_transformer(*, width: int, depth: int, heads: int, mlp_ratio: int, dropout: float) -> None:
    """Raise ConfigurationError if a size or the dropout of a transformer is out of range."""
    check_positive(width=width, depth=depth, heads=heads, mlp_ratio=mlp_ratio)
    if width % heads:
        raise ConfigurationError(f"width={width} must be a multiple of heads={heads}")
    if not 0.0 <= dropout < 1.0:
        raise ConfigurationError(f"dropout must lie in [0, 1), got {dropout!r}")


@torch.no_grad()
def init_transformer(model: nn.Module, std: float = 0.02) -> None:
    """Initialise ``model`` in place: normal weights of linear layers and embeddings, cut at two deviations; zero biases.

    Args:
        model: Any module.
        std: Standard deviation before the cut.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
