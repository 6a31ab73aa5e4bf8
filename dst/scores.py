"""Drop and grow scores: each ranks a layer's connections, higher being better to keep or to grow.

A score is a frozen dataclass. ``needs_gradient`` says whether it reads the dense gradient of the step, ``observes`` that
it must see every step's (the engine then keeps its buffer, and saves it). ``active_only`` marks scores that rank active
connections by nothing but the active ones, in whatever shape: those are drop scores for storage without inactive weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.topology import random_free
from dst.types import LayerView


class _Stateless:
    """A score that keeps no buffer and reads no gradient."""

    active_only: ClassVar[bool] = True

    @property
    def needs_gradient(self) -> bool:
        return False

    @property
    def observes(self) -> bool:
        return False

    def observe(self, buffer: Tensor | None, gradient: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} keeps no buffer")


@dataclass(frozen=True)
class Magnitude(_Stateless):
    """abs(w): the drop score of RigL (Evci et al. 2020), and of magnitude pruning."""

    def __call__(self, view: LayerView) -> Tensor:
        """abs(weight), float, of the layer's shape."""
        return view.weight.abs()


@dataclass(frozen=True)
class SignedMagnitude(_Stateless):
    """SET's drop score: the weights nearest zero go, *of each sign separately*.

    Mocanu et al. 2018 (https://arxiv.org/abs/1707.04780) drop a fraction of the smallest positive and the same fraction of
    the largest negative weights. The score is a weight's rank among the active ones of its sign, over their number, so
    that dropping the lowest takes the same share of both. Active weights that are exactly zero are of neither sign and go
    first, as in the authors' code.

    Deviation: the authors round the number dropped per sign; here the total is ``floor(fraction * active)`` exactly,
    which may move one connection from one sign to the other.
    """

    def __call__(self, view: LayerView) -> Tensor:
        """Rank within the sign, in (0, 1], float32, of the layer's shape; -1 for zeros, 0 where inactive."""
        active = view.mask.reshape(-1).nonzero().squeeze(1)
        weight = view.weight.take(active)
        ranks = torch.full(active.shape, -1.0, dtype=torch.float32, device=weight.device)
        for sign in (1, -1):
            members = (weight.sign() == sign).nonzero().squeeze(1)
            order = members[weight[members].abs().argsort(stable=True)]
            ranks[order] = torch.arange(1, order.numel() + 1, dtype=torch.float32, device=weight.device) / order.numel()
        result = torch.zeros(view.weight.shape, dtype=torch.float32, device=weight.device)
        return result.put_(active, ranks)


@dataclass(frozen=True)
class Gradient(_Stateless):
    """abs(dL/dw), of the dense gradient: RigL's growth score (Evci et al. 2020, Algorithm 1).

    The absolute value is taken once, of the gradient accumulated over micro-batches and reduced over ranks.
    """

    @property
    def needs_gradient(self) -> bool:
        """Always."""
        return True

    def __call__(self, view: LayerView) -> Tensor:
        """abs(gradient), float, of the layer's shape."""
        assert view.gradient is not None
        return view.gradient.abs()


@dataclass(frozen=True)
class Momentum(_Stateless):
    """Magnitude of an exponential mean of the dense gradients (Dettmers & Zettlemoyer 2019, arXiv:1907.04840).

    The mean is the engine's own: the optimizer's momentum sees masked gradients and is zero where it would be needed.
    It costs one float per weight, and a dense gradient at every step.

    Attributes:
        beta: Decay of the mean, in [0, 1).
    """

    beta: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ConfigurationError(f"beta={self.beta} of the momentum score must lie in [0, 1)")

    @property
    def needs_gradient(self) -> bool:
        """Always."""
        return True

    @property
    def observes(self) -> bool:
        """Always."""
        return True

    def observe(self, buffer: Tensor | None, gradient: Tensor) -> Tensor:
        """``beta * buffer + (1 - beta) * gradient``, in float32 or wider."""
        if buffer is None:
            buffer = torch.zeros_like(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
        return buffer.lerp_(gradient.to(buffer.dtype), 1 - self.beta)

    def __call__(self, view: LayerView) -> Tensor:
        """abs(mean gradient), float, of the layer's shape."""
        assert view.buffer is not None
        return view.buffer.abs()


@dataclass(frozen=True)
class Random(_Stateless):
    """Uniform random scores: SET's growth, and the random first mask."""

    active_only: ClassVar[bool] = False  # a number for every position, drawn in one stream

    def __call__(self, view: LayerView) -> Tensor:
        """Uniform in [0, 1), float32, of the layer's shape."""
        # Drawn on the CPU, so that the stream is the same on every device; ties are settled by the selection.
        return torch.rand(view.weight.shape, generator=view.generator).to(view.weight.device)

    def sample(self, size: int, barred: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Draw positions directly, with memory in proportion to what is barred."""
        return random_free(size, barred, count, generator)
