"""Multi-head attention whose projections store, train and save only their non-zero weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dst.errors import ConfigurationError
from dst.nn.sparse_linear import SparseLinear


class PackedProjection(SparseLinear):
    """The q, k and v projections of an attention module: one `SparseLinear` with ``3 * embed_dim`` outputs."""


class SparseMultiheadAttention(nn.Module):
    """``nn.MultiheadAttention`` with projections that store only their non-zeros.

    `forward` takes the arguments of ``nn.MultiheadAttention`` and returns its results. Self-attention computes q, k and v in
    one product. If query, key and value are different tensors, each is multiplied by all rows of the weight, and a third of
    each product is used.

    Args:
        in_proj: Projects to q, k and v.
        out_proj: Projects the output; may be dense.
        num_heads: Number of heads; divides the size of an input.
        dropout: Dropout of the attention weights in training.
        batch_first: Whether inputs are ``(N, L, E)`` instead of ``(L, N, E)``.

    Shape:
        - Query: ``(L, N, E)``, ``(N, L, E)`` with ``batch_first``, or ``(L, E)``. Key and value: the same with length S.
        - Output: of the query's shape, and attention weights ``(N, L, S)``, or None without ``need_weights``.

    Raises:
        ConfigurationError: The projections or the heads do not fit.
    """

    # None makes torch's encoder layers skip their fused path, which reads dense weights.
    in_proj_bias = None

    def __init__(
        self,
        in_proj: PackedProjection,
        out_proj: nn.Linear | SparseLinear,
        num_heads: int,
        *,
        dropout: float = 0.0,
        batch_first: bool = False,
    ):
        super().__init__()
        size = in_proj.in_features
        sizes = in_proj.out_features, out_proj.in_features, out_proj.out_features
        if sizes != (3 * size, size, size) or size % num_heads:
            raise ConfigurationError(
                f"projections of {size} inputs to {sizes} do not fit attention with {num_heads} heads"
            )
        self.embed_dim, self.num_heads, self.head_dim = size, num_heads, size // num_heads
        self.dropout, self.batch_first = dropout, batch_first
        self.in_proj, self.out_proj = in_proj, out_proj

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return f"num_heads={self.num_heads}, dropout={self.dropout}, batch_first={self.batch_first}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key`` and ``value``; see ``nn.MultiheadAttention.forward``."""
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask, which is missing")
        is_batched, batch_dim = query.dim() == 3, 0 if self.batch_first else 1
        if not is_batched:
            batch_dim, alone = 0, {x: x.unsqueeze(0) for x in (query, key, value)}
            query, key, value = alone[query], alone[key], alone[value]
        q, k, v = (self._heads(x, batch_dim) for x in self._projected(query, key, value))
        bias = self._bias(attn_mask, key_padding_mask, q, k.shape[2])
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(2, 3)
            weights = functional.softmax(scores if bias is None else scores + bias, dim=-1)
            weights = functional.dropout(weights, dropout) if dropout else weights
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, bias, dropout)
        y = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not is_batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_query = self.in_proj(query).chunk(3, -1)
        of_key = of_query if key is query else self.in_proj(key).chunk(3, -1)
        of_value = of_query if value is query else of_key if value is key else self.in_proj(value).chunk(3, -1)
        return of_query[0], of_key[1], of_value[2]

    def _heads(self, x: Tensor, batch_dim: int) -> Tensor:
        """From ``(N, L, E)``, or ``(L, N, E)``, to ``(N, heads, L, E / heads)``."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if batch_dim == 0 else x.permute(1, 2, 0, 3)

    def _bias(self, mask: Tensor | None, padding: Tensor | None, q: Tensor, length: int) -> Tensor | None:
        """Combine both masks into one that is added to the scores ``(N, heads, L, S)``. None without masks."""
        batch, heads, queries, _ = q.shape
        bias = None
        if mask is not None:
            shape = (1, 1, queries, length) if mask.dim() == 2 else (batch, heads, queries, length)
            bias = _as_bias(mask, q.dtype).view(shape)
        if padding is not None:
            hidden = _as_bias(padding, q.dtype).view(batch, 1, 1, length)
            bias = hidden if bias is None else bias + hidden
        return bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Names of a dense module.
        for part in ("weight", "bias"):
            if f"{prefix}in_proj_{part}" in state_dict:
                state_dict[f"{prefix}in_proj.{part}"] = state_dict.pop(f"{prefix}in_proj_{part}")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a mask to one that is added to the scores. A bool mask is True where attention is not allowed."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)
