"""Sparse activations: only the k largest activations of a layer are kept, all others are zero.

Activations are ``(N, units)`` after linear layers and ``(N, channels, …)`` after convolutions. The k winners of a sample
are chosen among all its entries, channels and positions together.

Models take activations as factories, `ActivationFactory`: called with the number of units (channels), it returns the module.
``functools.partial(KWinners, density=0.1)`` is one, and so is a Hydra node with ``_partial_: true``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from dst.errors import ConfigurationError

ActivationFactory: TypeAlias = Callable[[int], nn.Module]
"""Makes the activation of a layer from the number of its units (channels)."""


def k_winners(activations: Tensor, k: int, duty_cycle: Tensor | None = None, boost: float = 0.0) -> Tensor:
    """Keep the k entries of every sample whose boosted value is largest, and set all others to zero.

    Unit i is boosted by ``exp(β (k/n - d_i))``, for n entries in a sample and the duty cycle d of its unit (Ahmad &
    Scheinkman 2019, "How Can We Be So Dense? The Benefits of Using Highly Sparse Representations", section 3.2). Boosting
    decides which entries win; winners keep their own value. The gradient flows to winners only, not through boosting.

    Args:
        activations: ``(N, units)`` or ``(N, channels, …)``, floating point, n entries a sample.
        k: Winners of a sample, in 1..n. Exactly k are kept; ties are broken by ``torch.topk``.
        duty_cycle: How often each unit (channel) won lately: ``(units,)``, in [0, 1]. Only used with a ``boost``.
        boost: β >= 0; 0 for none.

    Returns:
        A tensor of the shape and dtype of ``activations``.

    Raises:
        ConfigurationError: ``k`` is out of range, or ``duty_cycle`` is missing.
    """
    winners = _winners(_boosted(activations.detach(), k, duty_cycle, boost), k)
    return activations * winners


def top_k_relu(activations: Tensor, k: int) -> Tensor:
    """ReLU that keeps only the k largest entries of every sample.

    k-sparse autoencoders (Makhzani & Frey 2014) keep the k largest linear activations; here negative ones are zero, too.

    Args:
        activations: ``(N, units)`` or ``(N, channels, …)``, floating point, n entries a sample.
        k: Entries of a sample that are kept, in 1..n; fewer if fewer are positive.

    Returns:
        A tensor of the shape and dtype of ``activations``.

    Raises:
        ConfigurationError: ``k`` is out of range.
    """
    positive = activations.relu()
    return positive * _winners(positive.detach(), k)


def updated_duty_cycle(duty_cycle: Tensor, won: Tensor, seen: int | Tensor, period: int) -> Tensor:
    """Move the duty cycle towards the share in which each unit won in a batch of N samples.

    ``d ← (d (T - N) + Σ won) / T`` with ``T = min(period, seen)``: a plain mean over the first samples, an exponential
    one of that period afterwards. For N >= T it is the batch's own share.

    Args:
        duty_cycle: ``(units,)`` in [0, 1].
        won: ``(N, units)`` or ``(N, channels, …)``, True where an entry won; a channel's share is over its positions.
        seen: Samples so far, this batch included.
        period: Samples over which the mean forgets, at least 1.

    Returns:
        The new duty cycle, ``(units,)`` in [0, 1].
    """
    samples = won.shape[0]
    share = won.to(duty_cycle.dtype).transpose(0, 1).flatten(1).mean(1)
    weight = (samples / torch.as_tensor(seen, device=duty_cycle.device).clamp(max=period)).clamp(max=1.0)
    return duty_cycle + weight.to(duty_cycle.dtype) * (share - duty_cycle)


class KWinners(nn.Module):
    """k-winners with boosting by duty cycle (Ahmad & Scheinkman 2019, section 3.2), as a replacement for ReLU.

    The share ``density`` of a layer's entries stays in training, ``inference_factor`` times as much in evaluation.
    Units that win less often than the average are boosted, so that all take part. The duty cycle and the number
    of samples that it has seen are buffers: they are part of ``state_dict`` and move only in training.

    Winners keep their sign: a ReLU in front, if wanted, is a module of its own. Deviations from the authors' code
    (``nupic.torch``): a unit's duty cycle counts its wins, as in the paper, where the code counts positive outputs; β
    stays as it is, where the code offers to decay it by epoch; samples seen are saved, too, so that a resumed run goes on
    exactly; in evaluation k is rounded once for layers of every kind. Under DDP, which copies the first process's
    buffers, its samples alone move the duty cycle.

    Args:
        units: Units of the layer (channels after a convolution).
        density: Share of the entries that win in training, in (0, 1].
        inference_factor: Multiplies the share in evaluation, >= 1; at most all entries win.
        boost: Strength β >= 0 of boosting; 0 for none.
        period: Samples over which the duty cycle forgets, at least 1.

    Attributes:
        duty_cycle: Share of the samples (and positions) in which each unit won lately, ``(units,)`` float32.
        seen: Samples seen in training, int64 scalar.

    Raises:
        ConfigurationError: A value out of range.
    """

    duty_cycle: Tensor
    seen: Tensor

    def __init__(
        self,
        units: int,
        density: float = 0.1,
        *,
        inference_factor: float = 1.5,
        boost: float = 1.0,
        period: int = 1000,
    ) -> None:
        super().__init__()
        _check_density(density)
        if not (math.isfinite(inference_factor) and inference_factor >= 1):
            raise ConfigurationError(f"inference_factor={inference_factor} must be at least 1")
        if not (math.isfinite(boost) and boost >= 0):
            raise ConfigurationError(f"boost={boost} must be at least 0; 0 is for none")
        if period < 1:
            raise ConfigurationError(f"period={period} must be at least 1 sample")
        self.units, self.density, self.inference_factor = units, density, inference_factor
        self.boost, self.period = boost, period
        self.register_buffer("duty_cycle", torch.zeros(units))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, activations: Tensor) -> Tensor:
        """Keep the winners of ``(N, units)`` or ``(N, channels, …)``; in training, update the duty cycle."""
        _check_units(activations, self.units)
        k = _count(activations, self.density if self.training else min(1.0, self.density * self.inference_factor))
        winners = _winners(_boosted(activations.detach(), k, self.duty_cycle, self.boost), k)
        if self.training:
            self.seen += activations.shape[0]
            self.duty_cycle.copy_(updated_duty_cycle(self.duty_cycle, winners, self.seen, self.period))
        return activations * winners

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return (
            f"{self.units}, density={self.density}, inference_factor={self.inference_factor}, boost={self.boost}, "
            f"period={self.period}"
        )


class TopKReLU(nn.Module):
    """`top_k_relu` that keeps a share of a layer's entries, the same in training and evaluation.

    Args:
        units: Units of the layer (channels after a convolution).
        density: Share of the entries that stay, in (0, 1].

    Raises:
        ConfigurationError: ``density`` is out of range.
    """

    def __init__(self, units: int, density: float = 0.1) -> None:
        super().__init__()
        _check_density(density)
        self.units, self.density = units, density

    def forward(self, activations: Tensor) -> Tensor:
        """Keep the largest positive entries of ``(N, units)`` or ``(N, channels, …)``."""
        _check_units(activations, self.units)
        return top_k_relu(activations, _count(activations, self.density))

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return f"{self.units}, density={self.density}"


def relu(units: int) -> nn.ReLU:
    """Return an ordinary ReLU: the activation factory that models use by default."""
    return nn.ReLU()


def _boosted(activations: Tensor, k: int, duty_cycle: Tensor | None, boost: float) -> Tensor:
    if boost == 0.0:
        return activations
    if duty_cycle is None:
        raise ConfigurationError(f"boost={boost} needs a duty_cycle")
    target = k / math.prod(activations.shape[1:])
    factors = torch.exp(boost * (target - duty_cycle))
    return activations * factors.view(-1, *[1] * (activations.ndim - 2))


def _winners(values: Tensor, k: int) -> Tensor:
    """True at the k largest entries of every sample."""
    flat = values.flatten(1)
    if not 1 <= k <= flat.shape[1]:
        raise ConfigurationError(f"k={k} must lie in 1..{flat.shape[1]}, the entries of a sample")
    winners = torch.zeros_like(flat, dtype=torch.bool)
    winners.scatter_(1, flat.topk(k, dim=1, sorted=False).indices, True)
    return winners.view(values.shape)


def _count(activations: Tensor, density: float) -> int:
    entries = math.prod(activations.shape[1:])
    k = round(density * entries)
    if k < 1:
        raise ConfigurationError(f"an activation density of {density} leaves none of {entries} units: raise it")
    return k


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ConfigurationError(f"an activation's density={density} must lie in (0, 1]: the share of units that stay")


def _check_units(activations: Tensor, units: int) -> None:
    if activations.ndim < 2 or activations.shape[1] != units:
        raise ConfigurationError(
            f"an activation of {units} units takes (N, {units}) or (N, {units}, …), got {tuple(activations.shape)}"
        )
