"""A mixture of experts with top-1 routing: Fedus et al. 2021, "Switch Transformers", section 2.

A router sends every token to one of several feed-forward networks. The number of weights grows with the number of experts;
the computation per token does not. Experts consist of ``nn.Linear`` layers, which can be sparse.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dst.errors import ConfigurationError
from dst.nn.sparse_linear import SparseLinear


class FeedForward(nn.Module):
    """The feed-forward part of a transformer block: linear, GELU, linear.

    Args:
        width: Features per token.
        hidden: Features of the hidden layer.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.project = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (…, width) to (…, width)."""
        if isinstance(self.expand, SparseLinear):  # computes GELU in its own pass
            return self.project(self.expand(tokens, gelu=True))
        return self.project(functional.gelu(self.expand(tokens)))


class SwitchFeedForward(nn.Module):
    """A feed-forward layer that sends each token to one of several experts.

    Each token is processed by its most probable expert, and the output is scaled by that probability (equations 1 and 2,
    top-1). An expert takes the first ``⌈factor · tokens / experts⌉`` tokens routed to it (equation 3). Tokens over this
    capacity are dropped: the output is zero, and the residual connection around the layer passes them on. Buffers have a
    fixed size, so the cost does not depend on the routing. Tokens are taken in order, sample by sample. A token can only
    displace later tokens, so causal models stay causal.

    In training ``forward`` sets ``auxiliary_loss`` to the load-balancing loss, multiplied by ``balance``.
    `auxiliary_losses` removes it.

    Deviations from the authors' code:

    - Capacities are rounded up and have no minimum of 4.
    - Tokens are routed over the whole batch of a process instead of over groups.
    - There is no expert dropout.
    - The router computes in float32 under autocast, and otherwise in the dtype of its weight.

    Args:
        width: Features per token.
        hidden: Hidden features of an expert.
        experts: Number of experts, at least 2.
        capacity_factor: Capacity of an expert in training, relative to perfectly balanced routing; > 0.
        eval_capacity_factor: The same in evaluation. With the number of experts as factor no token is dropped, and the
            cost is multiplied by it.
        balance: Coefficient α >= 0 of the load-balancing loss.
        jitter: In training, router inputs are multiplied by uniform noise in [1 - jitter, 1 + jitter]; in [0, 1).

    Attributes:
        auxiliary_loss: Load-balancing loss of the last forward pass in training, multiplied by α, a scalar; or None.

    Raises:
        ConfigurationError: A value is out of range.
    """

    auxiliary_loss: Tensor | None

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        *,
        capacity_factor: float = 1.25,
        eval_capacity_factor: float = 2.0,
        balance: float = 0.01,
        jitter: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(experts, int) or isinstance(experts, bool) or experts < 2:
            raise ConfigurationError(f"experts={experts!r} must be an integer of at least 2")
        for name, factor in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
            if not (math.isfinite(factor) and factor > 0):
                raise ConfigurationError(f"{name}={factor} must be positive")
        if not (math.isfinite(balance) and balance >= 0):
            raise ConfigurationError(f"balance={balance} must be at least 0")
        if not 0 <= jitter < 1:
            raise ConfigurationError(f"jitter={jitter} must lie in [0, 1)")
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.balance, self.jitter = balance, jitter
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(width, hidden) for _ in range(experts))
        self.auxiliary_loss = None

    def capacity(self, tokens: int) -> int:
        """Return the capacity of an expert for a batch of ``tokens`` tokens."""
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        return min(tokens, math.ceil(factor * tokens / len(self.experts)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map tokens (…, width) to (…, width). Dropped tokens give zeros."""
        tokens = inputs.flatten(0, -2)
        probabilities = self._route(tokens)
        gates, chosen = probabilities.max(1)
        if self.training:
            self.auxiliary_loss = self.balance * load_balancing_loss(probabilities, chosen)
        count, capacity = len(self.experts), self.capacity(len(tokens))
        # Row i·capacity + p holds the p-th token of expert i. The last row collects the dropped tokens.
        sent = functional.one_hot(chosen, count)
        place = (sent.cumsum(0) * sent).sum(1) - 1
        row = torch.where(place < capacity, chosen * capacity + place, count * capacity)
        buffer = tokens.new_zeros(count * capacity + 1, tokens.shape[1]).index_copy(0, row, tokens)
        shares = buffer[:-1].view(count, capacity, -1).unbind()
        outputs = torch.cat([expert(share) for expert, share in zip(self.experts, shares, strict=True)])
        outputs = functional.pad(outputs, (0, 0, 0, 1)).index_select(0, row)
        return (outputs * gates.to(outputs.dtype).unsqueeze(1)).view(inputs.shape)

    def _route(self, tokens: Tensor) -> Tensor:
        """Return the routing probabilities, (tokens, experts), in float32 or wider."""
        if self.training and self.jitter:
            tokens = tokens * torch.empty_like(tokens).uniform_(1 - self.jitter, 1 + self.jitter)
        device = "cpu" if tokens.is_meta else tokens.device.type  # there is no autocast for the meta device
        with torch.autocast(device, enabled=False):
            logits = self.router(tokens.to(next(self.router.parameters()).dtype))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)

    def __getstate__(self) -> dict[str, Any]:
        # The loss belongs to an autograd graph, which can be neither copied nor pickled.
        return {**self.__dict__, "auxiliary_loss": None}


def load_balancing_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """``N Σ_i f_i P_i`` (Fedus et al. 2021, equations 4 to 6, without α): 1 for uniform routing, at most N.

    Args:
        probabilities: Routing probabilities, ``(tokens, N)``. P is their mean over tokens.
        chosen: Expert of each token, int64 ``(tokens,)``. f is the fraction of tokens of each expert, including dropped
            ones. It has no gradient.

    Returns:
        A scalar.
    """
    experts = probabilities.shape[1]
    share = functional.one_hot(chosen, experts).to(probabilities.dtype).mean(0)
    return experts * (share * probabilities.mean(0)).sum()


def auxiliary_losses(model: nn.Module) -> list[Tensor]:
    """Remove and return the auxiliary losses that the modules of a model set in the last forward pass.

    Any module may set a scalar attribute ``auxiliary_loss`` in ``forward`` in training.

    ```python
    loss = functional.cross_entropy(model(inputs), labels)
    (loss + sum(auxiliary_losses(model))).backward()
    ```

    Args:
        model: Any module.

    Returns:
        The scalars, in the order of the modules. The attributes are None afterwards.
    """
    losses = []
    for module in model.modules():
        loss = getattr(module, "auxiliary_loss", None)
        if isinstance(loss, Tensor):
            losses.append(loss)
            module.auxiliary_loss = None  # type: ignore[assignment]
    return losses
