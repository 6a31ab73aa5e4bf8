"""A small decoder-only transformer: Radford et al. 2019 (GPT-2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dst.errors import ConfigurationError
from dst.models.common import check_positive, scaled
from dst.models.transformer import Attention, Block, check_transformer, init_transformer
from dst.nn import FeedForward, SwitchFeedForward


class GPT(nn.Module):
    """GPT-2's architecture at a size for CPUs: embeddings, pre-norm causal blocks, a norm, a linear head without bias.

    The initialisation is GPT-2's: normal weights with standard deviation 0.02 (here cut at two deviations). Weights of layers
    that add to the residual stream are divided by ``√(2 depth)``. Deviations: GELU is exact, not the tanh approximation;
    query, key and value are separate layers. Embeddings stay dense, as does a tied head.

    Args:
        vocab_size: Number of different tokens, at least 2.
        context: Largest number of tokens of a sequence.
        width: Features of a token, a multiple of ``heads``.
        depth: Number of blocks.
        heads: Attention heads of a block.
        mlp_ratio: Features within the feed-forward networks, as a multiple of ``width``.
        dropout: Probability in [0, 1) of dropping embeddings, attention weights and outputs of blocks' branches.
        tied: Share the token embedding's weight with the head (Press & Wolf 2017).
        experts: Experts of every ``expert_every``-th feed-forward network, at least 2; 0 for ordinary ones. See
            `dst.nn.SwitchFeedForward`. Add their loss with `dst.nn.auxiliary_losses`.
        expert_every: 2 puts experts into the 2nd, 4th, … block, as in the paper; 1 into every block.
        capacity_factor: Capacity of the experts in training.
        eval_capacity_factor: Capacity of the experts in evaluation.
        balance: Weight of the load-balancing loss.
        jitter: Noise on the router's inputs in training.
        width_factor: Multiplies ``width``, rounded to a multiple of ``heads``, and the features within the feed-forward
            networks; see `dst.models.narrow`.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    def __init__(
        self,
        vocab_size: int,
        context: int,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        tied: bool = False,
        experts: int = 0,
        expert_every: int = 2,
        capacity_factor: float = 1.25,
        eval_capacity_factor: float = 2.0,
        balance: float = 0.01,
        jitter: float = 0.0,
        width_factor: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive(vocab_size=vocab_size, context=context, expert_every=expert_every)
        check_transformer(width=width, depth=depth, heads=heads, mlp_ratio=mlp_ratio, dropout=dropout)
        if vocab_size < 2:
            raise ConfigurationError(f"vocab_size must be at least 2, got {vocab_size}")
        if experts and expert_every > depth:
            raise ConfigurationError(f"expert_every={expert_every} puts experts in none of {depth} blocks: lower it")

        width, hidden = scaled(width, width_factor, heads), scaled(mlp_ratio * width, width_factor)

        def feed_forward(block: int) -> nn.Module:
            if not experts or (block + 1) % expert_every:
                return FeedForward(width, hidden)
            return SwitchFeedForward(
                width,
                hidden,
                experts,
                capacity_factor=capacity_factor,
                eval_capacity_factor=eval_capacity_factor,
                balance=balance,
                jitter=jitter,
            )

        self.context = context
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(
                Block(
                    width, Attention(width, heads, causal=True, dropout=dropout), feed_forward(block), dropout=dropout
                )
                for block in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        init_transformer(self)
        with torch.no_grad():
            for module in self.blocks.modules():
                if isinstance(module, Attention):
                    module.out.weight.div_((2 * depth) ** 0.5)
                elif isinstance(module, FeedForward):
                    module.project.weight.div_((2 * depth) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (N, T), int64 with T <= context, to logits of the next tokens (N, T, vocab_size)."""
        length = tokens.shape[1]
        if length > self.context:
            raise ConfigurationError(f"a sequence of {length} tokens is longer than the context of {self.context}")
        places = torch.arange(length, device=tokens.device)
        features = self.dropout(self.tokens(tokens) + self.positions(places))
        return self.head(self.norm(self.blocks(features)))
