"""Sparse activations: keep the k largest activations of a layer and set all others to zero.

Activations are ``(N, units)`` after linear layers and ``(N, channels, …)`` after convolutions. The k winners of a sample
are chosen over all channels and positions.

Models take an `ActivationFactory`, which returns the module for a number of units (channels), for example
``functools.partial(KWinners, density=0.1)`` or a Hydra node with ``_partial_: true``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from dst.errors import ConfigurationError

ActivationFactory: TypeAlias = Callable[[int], nn.Module]
"""Returns the activation module for a number of units (channels)."""


def k_winners(activations: Tensor, k: int, duty_cycle: Tensor | None = None, boost: float = 0.0) -> Tensor:
    """Keep the k entries of every sample with the largest boosted values, and set all others to zero.

    Unit i is boosted by ``exp(β (k/n - d_i))``, where n is the number of entries in a sample and d_i the unit's duty cycle
    (Ahmad & Scheinkman 2019, "How Can We Be So Dense? The Benefits of Using Highly Sparse Representations", section 3.2).
    Boosting decides which entries win; winners keep their unboosted value. The gradient flows only to winners, and not
    through the boost.

    Args:
        activations: ``(N, units)`` or ``(N, channels, …)``, floating point, n entries per sample.
        k: Number of winners per sample, in 1..n. Exactly k entries are kept; ``torch.topk`` breaks ties.
        duty_cycle: Moving average of how often each unit (channel) wins: ``(units,)``, in [0, 1]. Used if ``boost > 0``.
        boost: β >= 0; 0 turns boosting off.

    Returns:
        A tensor of the shape and dtype of ``activations``.

    Raises:
        ConfigurationError: ``k`` is out of range, or ``duty_cycle`` is missing.
    """
    winners = _winners(_boosted(activations.detach(), k, duty_cycle, boost), k)
    return activations * winners


def top_k_relu(activations: Tensor, k: int) -> Tensor:
    """Apply ReLU and keep only the k largest entries of every sample.

    k-sparse autoencoders (Makhzani & Frey 2014) keep the k largest linear activations; here negative ones are also zero.

    Args:
        activations: ``(N, units)`` or ``(N, channels, …)``, floating point, n entries per sample.
        k: Number of entries to keep per sample, in 1..n. Fewer are non-zero if fewer are positive.

    Returns:
        A tensor of the shape and dtype of ``activations``.

    Raises:
        ConfigurationError: ``k`` is out of range.
    """
    positive = activations.relu()
    return positive * _winners(positive.detach(), k)


def updated_duty_cycle(duty_cycle: Tensor, won: Tensor, seen: int | Tensor, period: int) -> Tensor:
    """Update the duty cycle with the winners of a batch of N samples.

    ``d ← (d (T - N) + Σ won) / T`` with ``T = min(period, seen)``: the mean over the first ``period`` samples, then an
    exponential moving average. For N >= T it is the mean over the batch.

    Args:
        duty_cycle: ``(units,)`` in [0, 1].
        won: ``(N, units)`` or ``(N, channels, …)``, True where an entry won. Channels are averaged over positions.
        seen: Number of samples so far, including this batch.
        period: Period of the moving average in samples, at least 1.

    Returns:
        The new duty cycle, ``(units,)`` in [0, 1].
    """
    samples = won.shape[0]
    share = won.to(duty_cycle.dtype).transpose(0, 1).flatten(1).mean(1)
    weight = (samples / torch.as_tensor(seen, device=duty_cycle.device).clamp(max=period)).clamp(max=1.0)
    return duty_cycle + weight.to(duty_cycle.dtype) * (share - duty_cycle)


class KWinners(nn.Module):
    """k-winners with duty-cycle boosting (Ahmad & Scheinkman 2019, section 3.2), as a replacement for ReLU.

    Keeps a fraction ``density`` of a layer's entries in training, and ``inference_factor`` times as many in evaluation.
    Boosting favours units that win less often than the average. The duty cycle and the number of samples seen are
    buffers: ``state_dict`` contains them, and only training changes them.

    Winners keep their sign; put a ReLU in front for non-negative outputs. Deviations from the authors' code
    (``nupic.torch``):

    - The duty cycle counts wins, as in the paper; the code counts positive outputs.
    - β is constant; the code can decay it by epoch.
    - The number of samples seen is saved, so that resuming is exact.
    - In evaluation k is rounded once, for all types of layers.

    DDP broadcasts the buffers of rank 0, so only the samples of rank 0 update the duty cycle.

    Args:
        units: Number of units (channels after a convolution).
        density: Fraction of the entries that win in training, in (0, 1].
        inference_factor: Multiplies ``density`` in evaluation, >= 1. The product is clamped to 1.
        boost: Boost strength β >= 0; 0 turns boosting off.
        period: Period of the duty cycle's moving average in samples, at least 1.

    Attributes:
        duty_cycle: Moving average of how often each unit wins, ``(units,)`` float32.
        seen: Number of samples seen in training, int64 scalar.

    Raises:
        ConfigurationError: A value is out of range.
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
            raise ConfigurationError(f"boost={boost} must be at least 0; 0 turns boosting off")
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
    """`top_k_relu` with k a fraction of a layer's entries, the same in training and evaluation.

    Args:
        units: Number of units (channels after a convolution).
        density: Fraction of the entries to keep, in (0, 1].

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
    """Return ``nn.ReLU()``. The default activation factory of the models."""
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
        raise ConfigurationError(f"k={k} must lie in 1..{flat.shape[1]}, the number of entries per sample")
    winners = torch.zeros_like(flat, dtype=torch.bool)
    winners.scatter_(1, flat.topk(k, dim=1, sorted=False).indices, True)
    return winners.view(values.shape)


def _count(activations: Tensor, density: float) -> int:
    entries = math.prod(activations.shape[1:])
    k = round(density * entries)
    if k < 1:
        raise ConfigurationError(f"an activation density of {density} keeps none of {entries} entries: raise it")
    return k


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ConfigurationError(
            f"an activation's density={density} must lie in (0, 1]: the fraction of entries to keep"
        )


def _check_units(activations: Tensor, units: int) -> None:
    if activations.ndim < 2 or activations.shape[1] != units:
        raise ConfigurationError(
            f"an activation of {units} units takes (N, {units}) or (N, {units}, …), got {tuple(activations.shape)}"
        )
