"""Drop scores and grow scores: rank the weights of a layer; higher is better, to keep or to grow.

A score is a frozen dataclass. It is a ``Score`` of ``dst.types``, and may be an ``Observer``, ``ActiveScore``,
``AfterDropScore`` or ``Sampler`` too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.pieces.protocols import AfterDropScore, LayerView, Sampler, Score
from dst.topology.selection import random_free, stable_order


class _Stateless:
    """Defaults: no gradient, no buffer, and active weights are ranked from active weights alone."""

    needs_gradient: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    active_only: ClassVar[bool] = True

    def observe(self, buffer: Tensor | None, view: LayerView) -> Tensor:
        raise TypeError(f"{type(self).__name__} keeps no buffer")


@dataclass(frozen=True)
class Magnitude(_Stateless):
    """abs(w): the drop score of RigL (Evci et al. 2020) and of magnitude pruning."""

    def __call__(self, view: LayerView) -> Tensor:
        """abs(weight), float, of the layer's shape."""
        return view.weight.abs()


@dataclass(frozen=True)
class SignedMagnitude(_Stateless):
    """SET's drop score: drops the weights nearest zero, *separately for each sign*.

    Mocanu et al. 2018 (https://arxiv.org/abs/1707.04780) drop a fraction of the smallest positive weights and the same
    fraction of the largest negative ones. The score is the rank of a weight among the active weights of its sign, divided
    by their number, so the lowest scores are the same share of both signs. Active weights that are exactly zero have no
    sign and are dropped first, as in the authors' code.

    Deviation: the authors round the number of dropped weights for each sign. Here the total is exactly
    ``floor(fraction * active)``, which may move one dropped weight from one sign to the other.
    """

    def __call__(self, view: LayerView) -> Tensor:
        """Rank within the sign, in (0, 1], float32, of the layer's shape; -1 for zeros, 0 where inactive."""
        active = view.mask.reshape(-1).nonzero().squeeze(1)
        weight = view.weight.take(active)
        ranks = torch.full(active.shape, -1.0, dtype=torch.float32, device=weight.device)
        for sign in (1, -1):
            members = (weight.sign() == sign).nonzero().squeeze(1)
            order = members[stable_order(weight[members].abs())]
            ranks[order] = torch.arange(1, order.numel() + 1, dtype=torch.float32, device=weight.device) / order.numel()
        result = torch.zeros(view.weight.shape, dtype=torch.float32, device=weight.device)
        return result.put_(active, ranks)


@dataclass(frozen=True)
class MagnitudeAndGradient(_Stateless):
    """abs(w) + λ · abs(dL/dw): the drop score of MEST (Yuan et al. 2021, https://arxiv.org/abs/2110.14032, section 3.2).

    Keeps small weights to which the loss is sensitive.

    Attributes:
        strength: λ, >= 0.
    """

    needs_gradient: ClassVar[bool] = True
    active_only: ClassVar[bool] = False

    strength: float = 1.0

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ConfigurationError(f"strength={self.strength} of the gradient in a drop score must be at least 0")

    def __call__(self, view: LayerView) -> Tensor:
        """abs(weight) + strength · abs(gradient), float, of the layer's shape."""
        assert view.gradient is not None
        return view.weight.abs() + self.strength * view.gradient.abs()


@dataclass(frozen=True)
class KeptSign(_Stateless):
    """sign · w, where the sign of each connection never changes: negative once the weight has crossed zero.

    This is DeepR's parameter θ (Bellec et al. 2018, https://arxiv.org/abs/1711.05136, section 2), with w = sign · θ. The
    signs are fixed at the first step: the weight's sign where active, a random sign elsewhere.

    Deviation: the authors draw all signs at random and give the initial weights these signs. For symmetric distributions of
    weights this is the same.
    """

    observes: ClassVar[bool] = True
    active_only: ClassVar[bool] = False  # the buffer holds the signs of all positions

    def observe(self, buffer: Tensor | None, view: LayerView) -> Tensor:
        """The signs, int8, of the layer's shape; constant after the first call."""
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
    """abs(dL/dw) of the dense gradient: RigL's grow score (Evci et al. 2020, Algorithm 1).

    The gradient is accumulated over micro-batches and reduced over ranks before its absolute value is taken.
    """

    needs_gradient: ClassVar[bool] = True

    def __call__(self, view: LayerView) -> Tensor:
        """abs(gradient), float, of the layer's shape."""
        assert view.gradient is not None
        return view.gradient.abs()


@dataclass(frozen=True)
class Momentum(_Stateless):
    """Magnitude of an exponential moving average of dense gradients (Dettmers & Zettlemoyer 2019, arXiv:1907.04840).

    The average is not the optimizer's momentum, which sees masked gradients and is zero at inactive positions. It takes
    one float per weight and a dense gradient at every step.

    Attributes:
        beta: Decay of the average, in [0, 1).
    """

    needs_gradient: ClassVar[bool] = True
    observes: ClassVar[bool] = True

    beta: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ConfigurationError(f"beta={self.beta} of the momentum score must lie in [0, 1)")

    def observe(self, buffer: Tensor | None, view: LayerView) -> Tensor:
        """``beta * buffer + (1 - beta) * gradient``, in float32 or wider."""
        gradient = view.gradient
        assert gradient is not None
        if buffer is None:
            buffer = torch.zeros_like(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
        return buffer.lerp_(gradient.to(buffer.dtype), 1 - self.beta)

    def __call__(self, view: LayerView) -> Tensor:
        """abs(average gradient), float, of the layer's shape."""
        assert view.buffer is not None
        return view.buffer.abs()


@dataclass(frozen=True)
class Random(_Stateless, Sampler):
    """Uniform random scores: SET's grow score, and the random first mask."""

    active_only: ClassVar[bool] = False  # the random stream has a number for every position

    def __call__(self, view: LayerView) -> Tensor:
        """Uniform in [0, 1), float32, of the layer's shape."""
        # Drawn on the CPU, so the stream is the same on every device; the selection breaks ties.
        return torch.rand(view.weight.shape, generator=view.generator).to(view.weight.device)

    def sample(self, size: int, excluded: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Draw positions directly, with memory in proportion to the excluded ones; see ``Sampler``."""
        return random_free(size, excluded, count, generator)


@dataclass(frozen=True)
class Importance(_Stateless):
    """The importance of latent weights: their magnitude or a learned score, by the relaxation (``dst.relaxations``)."""

    active_only: ClassVar[bool] = False  # only storage of latent weights has it

    def __call__(self, view: LayerView) -> Tensor:
        """``view.importance``, float, of the layer's shape."""
        assert view.importance is not None
        return view.importance


@dataclass(frozen=True)
class CH3L3(_Stateless):
    """Cannistraci-Hebb theory's CH3-L3: predicts connections from the topology alone, without a gradient.

    Zhang et al. 2024 (CHT) and 2025 (CHTs; https://arxiv.org/abs/2501.19107, "CH3-L3n", the form for nodes). The layer is a
    bipartite graph. An inactive connection has a high score if it closes many paths of length three whose intermediate
    nodes have few links outside the local community. Let A be the mask, d its row sums, and E_ij = d_j - (A Aᵀ)_ij for rows
    i and j that share an input. A path over row j counts 1 / max(E_ij, 1). The score sums over paths by rows and by columns.

    The mask is the one after the drop. If ``regrow_dropped`` is False or the pattern is grouped, it is the one before.

    Deviation: the authors treat fully connected layers only. Here a convolution is the matrix of its outputs by (input
    channel, kernel position); each kernel position of a channel is a node.
    """

    active_only: ClassVar[bool] = False
    after_drop: ClassVar[bool] = True

    def __call__(self, view: LayerView) -> Tensor:
        """Score >= 0, float32, of the layer's shape; scores of active connections have no meaning."""
        links = view.mask.flatten(1).float()
        return (_paths(links) + _paths(links.t()).t()).reshape(view.mask.shape)


def _paths(links: Tensor) -> Tensor:
    """For every (row, column): sum of 1 / max(external, 1) over rows that have the column and share one with the row."""
    shared = links @ links.t()
    external = links.sum(1) - shared  # links of the intermediate row outside the shared ones
    return torch.where(shared > 0, 1 / external.clamp(min=1), 0) @ links


@dataclass(frozen=True)
class Soft(_Stateless):
    """Samples by a score instead of taking the best: with probability proportional to score^(1 / temperature).

    This is the soft sampling of CHTs (Zhang et al. 2025, https://arxiv.org/abs/2501.19107), without replacement. It takes
    the best of log(score) / temperature plus Gumbel noise (Gumbel-top-k trick; Kool et al. 2019,
    https://arxiv.org/abs/1903.06059).

    Attributes:
        score: A score >= 0 that needs no gradient and does not observe.
        temperature: Sampling temperature, > 0. Close to 0 the best scores win; higher values bring probabilities together.
    """

    active_only: ClassVar[bool] = False

    score: Score = field(default_factory=Magnitude)
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigurationError(f"temperature={self.temperature} must be positive; use the score itself for 0")
        if self.score.needs_gradient or self.score.observes:
            raise ConfigurationError(f"Soft draws by scores of weights or topology, not by {type(self.score).__name__}")

    @property
    def after_drop(self) -> bool:
        """As for the score."""
        return isinstance(self.score, AfterDropScore) and self.score.after_drop

    def __call__(self, view: LayerView) -> Tensor:
        """log(score) / temperature + noise, float32 or wider, of the layer's shape; lowest where the score is 0."""
        scores = self.score(view)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        # Exponential variables E give Gumbel noise -log(E). Drawn on the CPU: the same on every device.
        noise = torch.empty(scores.shape, dtype=torch.float64).exponential_(generator=view.generator).log()
        positive = scores.clamp(min=torch.finfo(scores.dtype).tiny)
        drawn = positive.log() / self.temperature - noise.to(scores)
        # Positions of score 0 come after all others, in random order.
        return torch.where(scores > 0, drawn, drawn - 1e6)
