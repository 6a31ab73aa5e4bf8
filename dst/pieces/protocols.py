"""What the pieces of a method look like to the engine: protocols, and the views that they are shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dst.topology.layers import SparseLayer
    from dst.topology.rewiring import Rewiring


@dataclass(frozen=True)
class LayerView:
    """What a score may look at; all tensors have the layer's shape.

    Attributes:
        weight: The layer's weights, detached; zeros where inactive, or latent weights where the backend keeps them.
        mask: Bool, True where active.
        gradient: The dense gradient (accumulated, reduced over ranks, unscaled, unclipped), or ``None`` where the
            score did not ask for it.
        buffer: What the score's ``observe`` returned last, or ``None``.
        generator: A CPU generator folded from seed, step and layer, for random scores.
        importance: What a relaxation ranks latent weights by, or ``None`` where there is none.
    """

    weight: Tensor
    mask: Tensor
    gradient: Tensor | None
    buffer: Tensor | None
    generator: torch.Generator
    importance: Tensor | None = None


@runtime_checkable
class Score(Protocol):
    """Ranks connections: higher is better, for survival as for growth."""

    @property
    def needs_gradient(self) -> bool:
        """Whether ``__call__`` reads ``view.gradient``."""

    @property
    def observes(self) -> bool:
        """Whether it is an ``Observer``, shown every step; with the dense gradient where ``needs_gradient``."""

    def __call__(self, view: LayerView) -> Tensor:
        """Score every position of the layer; float, of the layer's shape."""


@runtime_checkable
class Observer(Score, Protocol):
    """A score that watches every step, and keeps a buffer of the layer's shape; ``observes`` is True."""

    def observe(self, buffer: Tensor | None, view: LayerView) -> Tensor:
        """Return the buffer after seeing this step's weights and dense gradient; may update ``buffer`` in place.

        ``view.gradient`` is there where the score needs it.
        """


@runtime_checkable
class Sampler(Protocol):
    """A score or init whose best connections are a uniform draw: it needs no number for every position."""

    def sample(self, size: int, excluded: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Draw ``count`` of ``size`` positions but the excluded (sorted, int64); sorted, on the device of ``excluded``."""


def as_sampler(piece: object) -> Sampler | None:
    """The score or init itself if it draws its connections, ``None`` if it scores them.

    A subclass that scores in a way of its own does not draw, though it inherits ``sample``.
    """
    for kind in type(piece).__mro__:
        if "sample" in vars(kind):
            return piece if isinstance(piece, Sampler) else None
        if "__call__" in vars(kind) or "scores" in vars(kind):
            return None
    return None


class Allocation(Protocol):
    """Splits a network's budget over its layers."""

    @property
    def needs_scores(self) -> bool:
        """Whether the split depends on the connections' scores."""

    def counts(
        self,
        names: Sequence[str],
        shapes: Sequence[tuple[int, ...]],
        density: float,
        scores: Sequence[Tensor] | None = None,
    ) -> list[int]:
        """Active weights of each layer."""


class Init(Protocol):
    """Scores connections for the first mask."""

    @property
    def needs_gradient(self) -> bool:
        """Whether the first mask waits for a dense gradient."""

    def scores(self, view: LayerView) -> Tensor:
        """Score every position of the layer; float, of the layer's shape."""


class Pattern(Protocol):
    """Says which weights are active together; see ``dst.patterns``."""

    @property
    def is_grouped(self) -> bool:
        """Whether ``select`` and ``rewire`` choose, rather than unstructured selection with one budget per layer."""

    @property
    def is_free(self) -> bool:
        """Whether layers may have any density, rather than one that follows from the pattern."""

    def for_density(self, density: float) -> Pattern:
        """The pattern with what depends on the network's density resolved."""

    def unsupported_reason(self, layer: SparseLayer) -> str | None:
        """Why the layer cannot have the pattern (it stays dense then), or ``None``."""

    def fit(self, layer: SparseLayer, count: int) -> int:
        """The number of active weights that comes nearest to ``count`` and the pattern can hold."""

    def holds(self, layer: SparseLayer, mask: Tensor) -> bool:
        """Whether a mask has the pattern."""

    def spread(self, layer: SparseLayer, scores: Tensor) -> Tensor:
        """Every weight's score replaced by that of its group; of the layer's shape."""

    def select(self, layer: SparseLayer, scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Sorted positions of the best ``count`` weights."""

    def rewire(
        self,
        layer: SparseLayer,
        mask: Tensor,
        drop_scores: Tensor,
        grow_scores: Tensor | None,
        drop: int,
        grow: int,
        *,
        regrow_dropped: bool,
        generator: torch.Generator,
    ) -> Rewiring:
        """Drop and grow within the pattern."""


class DensitySchedule(Protocol):
    """The budget over time, for methods whose density moves."""

    def __call__(self, step: int, total_steps: int, final: float) -> float:
        """Density in (0, 1] that holds from an update at ``step`` on; ``final`` is the method's."""

    def settles_at(self, total_steps: int) -> int:
        """The step from which on it is ``final``."""


@dataclass(frozen=True)
class LayerStat:
    """What a redistribution knows of a layer at an update.

    Attributes:
        weights: Number of weights.
        kept: Active ones that the update does not drop.
        strength: What the redistribution's ``measure`` returned.
    """

    weights: int
    kept: int
    strength: float


class Redistribution(Protocol):
    """Moves budget between layers at updates."""

    @property
    def needs_gradient(self) -> bool:
        """Whether ``measure`` reads the gradient, or the grow score's buffer where that observes."""

    def measure(self, view: LayerView) -> float:
        """A layer's claim, >= 0."""

    def grow_counts(self, stats: Sequence[LayerStat], total: int) -> list[int]:
        """How ``total`` grown connections are split over the layers."""


class Perturbation(Protocol):
    """Something added to the gradients of active weights at every step."""

    def __call__(self, view: LayerView, lr: float) -> Tensor:
        """What is added, of the layer's shape; where inactive it does not matter.

        Args:
            view: The layer; ``gradient`` is ``None``, ``buffer`` that of the drop score.
            lr: The optimizer's learning rate for it.
        """


class Amount(Protocol):
    """How many connections an update drops, where the weights decide and not a fraction."""

    @property
    def initial_state(self) -> float:
        """What ``counts`` is given at the first update."""

    def counts(self, views: Sequence[LayerView], scores: Sequence[Tensor], state: float) -> tuple[list[int], float]:
        """Number to drop in every layer, and the state for the next update.

        Args:
            views: The layers.
            scores: Their drop scores.
            state: What the last update returned.
        """


@runtime_checkable
class LossInit(Init, Protocol):
    """An init that scores the whole network at once, from the graph of the loss."""

    @property
    def output_scale(self) -> float:
        """What the model's outputs are multiplied with in the step that is scored, which moves no weight."""

    def loss_scores(
        self,
        loss: Tensor,
        weights: Sequence[Tensor],
        average: Callable[[Sequence[Tensor]], list[Tensor]],
    ) -> list[Tensor]:
        """Score all positions of all weights; leaves the graph to ``loss.backward()``, and no ``.grad`` behind.

        Args:
            loss: This process's loss, with its graph.
            weights: The sparse parameters, leaves of that graph.
            average: Means over processes, tensor by tensor.

        Returns:
            One float tensor per weight, of its shape, the same on all processes.
        """


@runtime_checkable
class CallInit(Init, Protocol):
    """An init that scores the whole network at once, from calls of the model without data."""

    def call_scores(
        self,
        output: Callable[[Sequence[Tensor]], Tensor],
        weights: Sequence[Tensor],
        select: Callable[[Sequence[Tensor], float], list[Tensor]],
    ) -> list[Tensor]:
        """Score all positions of all weights.

        Args:
            output: The sum of the model's outputs (scalar float64) on inputs of ones, for given weights, with all its
                other parameters at their absolute values; differentiable.
            weights: The sparse parameters, detached float64.
            select: Masks (bool, one per weight) that keep the best scores, for a progress in [0, 1] from the dense
                network to the method's budget; the same on all the way as in the end.

        Returns:
            One float tensor per weight, of its shape.
        """


def waits_for_batch(init: Init) -> bool:
    """Whether the first mask can only be made in training, once a batch has been seen."""
    return init.needs_gradient or isinstance(init, (LossInit, CallInit))


class Fraction(Protocol):
    """The share of active connections that an update replaces."""

    def __call__(self, step: int, stop: int) -> float:
        """The fraction in [0, 1] at ``step``, for updates that end at ``stop``."""


class Clock(Protocol):
    """Says at which optimizer steps the topology is updated."""

    def fires(self, step: int, total_steps: int) -> bool:
        """Whether the step numbered ``step`` (from 0) updates the topology."""

    def stop_step(self, total_steps: int) -> int:
        """The first step at which the clock never fires again."""
