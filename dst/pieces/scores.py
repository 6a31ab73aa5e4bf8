"""Drop and grow scores: each ranks a layer's connections, higher being better to keep or to grow.

A score is a frozen dataclass. ``needs_gradient`` says whether it reads the dense gradient of the step, ``observes`` that
it must see every step (the engine then keeps its buffer, and saves it). ``active_only`` marks scores that rank active
connections by nothing but the active ones, in whatever shape: those are drop scores for storage without inactive weights.
``after_drop`` marks grow scores whose ``view.mask`` is what the drop has left, not what was active before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.pieces.protocols import LayerView, Score
from dst.topology.selection import random_free


class _Stateless:
    """A score that keeps no buffer and reads no gradient."""

    active_only: ClassVar[bool] = True

    @property
    def needs_gradient(self) -> bool:
        return False

    @property
    def observes(self) -> bool:
        return False

    def observe(self, buffer: Tensor | None, view: LayerView) -> Tensor:
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
class MagnitudeAndGradient(_Stateless):
    """abs(w) + λ · abs(dL/dw): the drop score of MEST (Yuan et al. 2021, https://arxiv.org/abs/2110.14032, section 3.2).

    A small weight that the loss is about to change is spared.

    Attributes:
        strength: λ, >= 0.
    """

    active_only: ClassVar[bool] = False

    strength: float = 1.0

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ConfigurationError(f"strength={self.strength} of the gradient in a drop score must not be negative")

    @property
    def needs_gradient(self) -> bool:
        """Always."""
        return True

    def __call__(self, view: LayerView) -> Tensor:
        """abs(weight) + strength · abs(gradient), float, of the layer's shape."""
        assert view.gradient is not None
        return view.weight.abs() + self.strength * view.gradient.abs()


@dataclass(frozen=True)
class KeptSign(_Stateless):
    """The weight along a sign that its connection keeps for good: negative once it has crossed zero.

    DeepR's parameter θ (Bellec et al. 2018, https://arxiv.org/abs/1711.05136, section 2) with w = sign · θ. Every
    position has a sign from the start: that of the first weight where active, a random one elsewhere.

    Deviation: the authors draw all signs at random and make the first weights follow them, which is the same for weights
    whose distribution is symmetric.
    """

    active_only: ClassVar[bool] = False  # it knows the signs of every position

    @property
    def observes(self) -> bool:
        """Always, for the signs; it needs no gradient."""
        return True

    def observe(self, buffer: Tensor | None, view: LayerView) -> Tensor:
        """The signs, int8 of the layer's shape: drawn at first sight, the same ever after."""
        if buffer is not None:
            return buffer
        drawn = torch.randint(2, view.weight.shape, generator=view.generator, dtype=torch.int8) * 2 - 1
        signs = view.weight.sign().to(torch.int8)
        return torch.where(signs == 0, drawn.to(signs.device), signs)

    def __call__(self, view: LayerView) -> Tensor:
        """Weight · sign, float, of the layer's shape."""
        assert view.buffer is not None
        return view.weight * view.buffer


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

    def observe(self, buffer: Tensor | None, view: LayerView) -> Tensor:
        """``beta * buffer + (1 - beta) * gradient``, in float32 or wider."""
        gradient = view.gradient
        assert gradient is not None
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

    def sample(self, size: int, excluded: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Draw positions directly, with memory in proportion to what is excluded."""
        return random_free(size, excluded, count, generator)


@dataclass(frozen=True)
class Importance(_Stateless):
    """What the method's relaxation ranks latent weights by: their magnitude, or a learned score (``dst.relaxations``)."""

    active_only: ClassVar[bool] = False  # only storage of latent weights knows it

    def __call__(self, view: LayerView) -> Tensor:
        """Float, of the layer's shape."""
        assert view.importance is not None
        return view.importance


@dataclass(frozen=True)
class CH3L3(_Stateless):
    """Cannistraci-Hebb theory's CH3-L3: predicts connections from the topology alone, without a gradient.

    Zhang et al. 2024 (CHT), and 2025 (CHTs; https://arxiv.org/abs/2501.19107, "CH3-L3n", the form for nodes). The layer is
    a bipartite graph. Inactive connections score high that would close many paths of length three whose intermediate nodes
    have few links outside the local community. With A the mask, d its row sums, and E = (d_j - (A Aᵀ)_ij) where two rows
    share an input, a path over row j counts 1 / max(E_ij, 1); the same over columns, both added up.

    The mask is that after the drop. Where ``regrow_dropped`` is off, or a pattern groups connections, it is that before.

    A convolution is read as the matrix of its outputs by (input channel, kernel position): every kernel position of a channel
    is a node. The authors treat fully connected layers only.
    """

    active_only: ClassVar[bool] = False
    after_drop: ClassVar[bool] = True

    def __call__(self, view: LayerView) -> Tensor:
        """Score, float32, of the layer's shape, >= 0; what active connections get has no meaning."""
        links = view.mask.flatten(1).float()
        return (_paths(links) + _paths(links.t()).t()).reshape(view.mask.shape)


def _paths(links: Tensor) -> Tensor:
    """For every (row, column): the sum over rows that have the column and share one with the row, of 1 / max(external, 1)."""
    shared = links @ links.t()
    external = links.sum(1) - shared  # of the intermediate row, links outside what it shares
    return torch.where(shared > 0, 1 / external.clamp(min=1), 0) @ links


@dataclass(frozen=True)
class Soft(_Stateless):
    """Draws by a score instead of taking its best: the chance of a connection is proportional to score^(1 / temperature).

    Soft sampling of CHTs (Zhang et al. 2025, https://arxiv.org/abs/2501.19107), without replacement: the best of
    log(score) / temperature plus Gumbel noise (the Gumbel-top-k trick; Kool et al. 2019, https://arxiv.org/abs/1903.06059).

    Attributes:
        score: A score >= 0 that reads no gradient.
        temperature: > 0; towards 0 it is the score itself, from 1 on all connections come close to each other.
    """

    score: Score = field(default_factory=Magnitude)
    temperature: float = 1.0
    active_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigurationError(f"temperature={self.temperature} must be positive; use the score itself for 0")
        if self.score.needs_gradient or self.score.observes:
            raise ConfigurationError(f"Soft draws by scores of weights or topology, not by {type(self.score).__name__}")

    @property
    def after_drop(self) -> bool:
        """As the score."""
        return bool(getattr(self.score, "after_drop", False))

    def __call__(self, view: LayerView) -> Tensor:
        """log(score) / temperature + noise, float32 or wider, of the layer's shape; lowest of all where the score is 0."""
        scores = self.score(view)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        # Exponential variables E give Gumbel noise -log(E). Drawn on the CPU: the same on every device.
        noise = torch.empty(scores.shape, dtype=torch.float64).exponential_(generator=view.generator).log()
        positive = scores.clamp(min=torch.finfo(scores.dtype).tiny)
        drawn = positive.log() / self.temperature - noise.to(scores)
        # Those without any score come after all others, at random.
        return torch.where(scores > 0, drawn, drawn - 1e6)
