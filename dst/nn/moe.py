"""A mixture of experts with top-1 routing: Fedus et al. 2021, "Switch Transformers", section 2.

Every token is sent to one of several feed-forward networks, so that weights grow with the number of experts and the
computation per token does not. The experts are ordinary linear layers, whose weights can be sparse like any others.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dst.errors import ConfigurationError


class FeedForward(nn.Module):
    """The feed-forward part of a transformer block: linear, GELU, linear.

    Args:
        width: Features of a token.
        hidden: Features between the two layers.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.project = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (…, width) to (…, width)."""
        return self.project(functional.gelu(self.expand(tokens)))


class SwitchFeedForward(nn.Module):
    """A feed-forward layer whose every token passes through one of several experts.

    The router's most probable expert processes a token, and its probability scales the outcome (equations 1 and 2, for one
    expert). An expert takes ``⌈factor · tokens / experts⌉`` tokens (equation 3), the first that come; what overflows is
    dropped, that is, the layer returns zeros for it, and the residual connection around the layer passes it on. Buffers are
    of fixed size, so that the cost does not depend on the routing. Tokens come sample by sample and in order, so that a
    token may displace later ones, never earlier ones: causal models stay causal.

    In training the layer leaves its load-balancing loss, already multiplied by ``balance``, in ``auxiliary_loss``, until
    `auxiliary_losses` removes it.

    Deviations from the authors' code: capacities are rounded up and have no minimum of 4; tokens are routed over the
    whole batch of a process instead of groups; expert dropout is not offered; the router computes in float32 under
    autocast, and otherwise in the precision of its weight.

    Args:
        width: Features of a token.
        hidden: Features within an expert.
        experts: Number of experts, at least 2.
        capacity_factor: Room of the experts in training, > 0; 1 would do if routing were perfectly balanced.
        eval_capacity_factor: The same in evaluation; the number of experts drops nothing, at as many times the cost.
        balance: α >= 0 of the load-balancing loss.
        jitter: In training, the router's inputs are multiplied by uniform noise in [1 - jitter, 1 + jitter]; in [0, 1).

    Attributes:
        auxiliary_loss: α-weighted load-balancing loss of the last forward pass in training, a scalar; or None.

    Raises:
        ConfigurationError: A value out of range.
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
        """Return how many of ``tokens`` tokens an expert takes at most."""
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        return min(tokens, math.ceil(factor * tokens / len(self.experts)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map tokens (…, width) to (…, width); zeros for those that were dropped."""
        tokens = inputs.flatten(0, -2)
        probabilities = self._route(tokens)
        gates, chosen = probabilities.max(1)
        if self.training:
            self.auxiliary_loss = self.balance * load_balancing_loss(probabilities, chosen)
        count, capacity = len(self.experts), self.capacity(len(tokens))
        # Row i·capacity + p holds the p-th token of expert i. The last row takes the dropped tokens, and returns zeros.
        sent = functional.one_hot(chosen, count)
        place = (sent.cumsum(0) * sent).sum(1) - 1
        row = torch.where(place < capacity, chosen * capacity + place, count * capacity)
        buffer = tokens.new_zeros(count * capacity + 1, tokens.shape[1]).index_copy(0, row, tokens)
        shares = buffer[:-1].view(count, capacity, -1).unbind()
        outputs = torch.cat([expert(share) for expert, share in zip(self.experts, shares, strict=True)])
        outputs = functional.pad(outputs, (0, 0, 0, 1)).index_select(0, row)
        return (outputs * gates.to(outputs.dtype).unsqueeze(1)).view(inputs.shape)

    def _route(self, tokens: Tensor) -> Tensor:
        """Return each token's probabilities of the experts, (tokens, experts), float32 or wider."""
        if self.training and self.jitter:
            tokens = tokens * torch.empty_like(tokens).uniform_(1 - self.jitter, 1 + self.jitter)
        device = (
            "cpu" if tokens.is_meta else tokens.device.type
        )  # the meta device, on which costs are counted, has none
        with torch.autocast(device, enabled=False):
            logits = self.router(tokens.to(next(self.router.parameters()).dtype))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)

    def __getstate__(self) -> dict[str, Any]:
        # A remaining loss is part of a graph, which can be neither copied nor pickled.
        return {**self.__dict__, "auxiliary_loss": None}


def load_balancing_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """``N Σ_i f_i P_i`` (Fedus et al. 2021, equations 4 to 6, without α): 1 where routing is uniform, up to N.

    Args:
        probabilities: The router's, ``(tokens, N)``; P is their mean over tokens.
        chosen: Expert of each token, int64 ``(tokens,)``; f is the share of the tokens of each expert, counted before
            any is dropped, and has no gradient.

    Returns:
        A scalar.
    """
    experts = probabilities.shape[1]
    share = functional.one_hot(chosen, experts).to(probabilities.dtype).mean(0)
    return experts * (share * probabilities.mean(0)).sum()


def auxiliary_losses(model: nn.Module) -> list[Tensor]:
    """Remove and return the auxiliary losses that the modules of a model set in the last forward pass.

    A module takes part by an attribute ``auxiliary_loss``, a scalar that it sets in ``forward`` in training.

    ```python
    loss = functional.cross_entropy(model(inputs), labels)
    (loss + sum(auxiliary_losses(model))).backward()
    ```

    Args:
        model: Any module.

    Returns:
        The scalars, in the order of the modules; they are None in the modules afterwards.
    """
    losses = []
    for module in model.modules():
        loss = getattr(module, "auxiliary_loss", None)
        if isinstance(loss, Tensor):
            losses.append(loss)
            module.auxiliary_loss = None  # type: ignore[assignment]
    return losses
