"""Protocols of a method's pieces, and the views of a layer that the engine passes to them.

Members that are the same for all instances of a piece may be class attributes instead of properties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dst.topology.layers import SparseLayer
    from dst.topology.rewiring import Rewiring


@dataclass(frozen=True)
class LayerView:
    """What a score sees of a layer; all tensors have the layer's shape.

    Attributes:
        weight: Weights, detached; zero where inactive, latent weights under a relaxation.
        mask: Bool, True where active.
        gradient: Dense gradient (accumulated, reduced over ranks, unscaled, unclipped); ``None`` unless the score needs it.
        buffer: The score's buffer, as ``observe`` last returned it; ``None`` if there is none.
        generator: CPU generator, seeded by seed, step and layer, for random scores.
        importance: Scores by which the relaxation ranks latent weights; ``None`` without a relaxation.
    """

    weight: Tensor
    mask: Tensor
    gradient: Tensor | None
    buffer: Tensor | None
    generator: torch.Generator
    importance: Tensor | None = None


@runtime_checkable
class Score(Protocol):
    """Ranks weights for dropping or growing; higher is better: to keep, or to grow."""

    @property
    def needs_gradient(self) -> bool:
        """Whether the score reads ``view.gradient``."""

    @property
    def observes(self) -> bool:
        """Whether the score is an ``Observer``, which sees every step."""

    def __call__(self, view: LayerView) -> Tensor:
        """Return a score for every position; float, of the layer's shape."""


@runtime_checkable
class Observer(Score, Protocol):
    """A score that sees every step and keeps a buffer of the layer's shape; its ``observes`` is True."""

    def observe(self, buffer: Tensor | None, view: LayerView) -> Tensor:
        """Return the buffer after this step; may update ``buffer`` in place.

        Args:
            buffer: What the last call returned; ``None`` at the first.
            view: The layer at this step, with its dense gradient if the score needs one.
        """


@runtime_checkable
class ActiveScore(Score, Protocol):
    """A score that may rank active weights from active weights alone.

    Storage without inactive weights takes it as drop score. There the tensors of a view are vectors with one entry per
    active weight.
    """

    @property
    def active_only(self) -> bool:
        """Whether a score depends on active weights alone, in tensors of any shape."""


@runtime_checkable
class AfterDropScore(Score, Protocol):
    """A grow score that may depend on the mask after the drop."""

    @property
    def after_drop(self) -> bool:
        """Whether ``view.mask`` has to be the mask after the drop, instead of the one before the update."""


@runtime_checkable
class Sampler(Protocol):
    """A score or init that draws positions uniformly, without a score for every position.

    A piece that inherits from this class may be subclassed: where a subclass overrides ``__call__`` or ``scores`` but not
    ``sample``, its ``sample`` is ``None``, and it scores like any other piece.
    """

    def __init_subclass__(cls, **settings: Any) -> None:
        """Turn sampling off in subclasses that score differently."""
        super().__init_subclass__(**settings)
        if vars(cls).keys() & {"__call__", "scores"} and "sample" not in vars(cls):
            cls.sample = None  # type: ignore[method-assign, assignment]

    def sample(self, size: int, excluded: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Draw positions.

        Args:
            size: Number of positions of the layer.
            excluded: Positions that may not be drawn, int64, sorted.
            count: Number of positions to draw, at most ``size`` minus the excluded.
            generator: CPU generator.

        Returns:
            ``count`` distinct positions, int64, sorted, on the device of ``excluded``.
        """


def as_sampler(piece: object) -> Sampler | None:
    """Return the score or init if it samples, ``None`` if it scores."""
    return piece if isinstance(piece, Sampler) and piece.sample is not None else None


class Allocation(Protocol):
    """Splits a network's budget over its layers."""

    @property
    def needs_scores(self) -> bool:
        """Whether the split depends on scores of the weights."""

    def counts(
        self,
        names: Sequence[str],
        shapes: Sequence[tuple[int, ...]],
        density: float,
        scores: Sequence[Tensor] | None = None,
    ) -> list[int]:
        """Return the number of active weights of each layer.

        Args:
            names: Names of the layers.
            shapes: Shapes of the layers.
            density: Density of the network, in (0, 1].
            scores: One float tensor per layer, of its shape, if ``needs_scores``.
        """


class Init(Protocol):
    """Ranks weights for the first mask."""

    @property
    def needs_gradient(self) -> bool:
        """Whether the first mask needs a dense gradient, and so a first step."""

    def scores(self, view: LayerView) -> Tensor:
        """Return a score for every position; float, of the layer's shape; higher is better."""


class Pattern(Protocol):
    """Decides which weights are active together; see ``dst.patterns``."""

    @property
    def is_grouped(self) -> bool:
        """Whether ``select`` and ``rewire`` choose the weights; False for unstructured selection."""

    @property
    def is_free(self) -> bool:
        """Whether layers may have any density; False if the pattern determines it."""

    def for_density(self, density: float) -> Pattern:
        """Return the pattern with settings resolved that depend on the density of the network, in (0, 1]."""

    def unsupported_reason(self, layer: SparseLayer) -> str | None:
        """Return why the layer cannot have the pattern and stays dense, or ``None`` if it can."""

    def fit(self, layer: SparseLayer, count: int) -> int:
        """Return the number of active weights nearest to ``count`` that the pattern allows."""

    def holds(self, layer: SparseLayer, mask: Tensor) -> bool:
        """Return whether a mask has the pattern."""

    def spread(self, layer: SparseLayer, scores: Tensor) -> Tensor:
        """Return the score of its group for every weight, of the layer's shape."""

    def select(self, layer: SparseLayer, scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Return the positions of the best ``count`` weights, int64, sorted."""

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
        """Return the positions that an update drops and grows.

        Args:
            layer: The layer.
            mask: Bool, the present mask, of the layer's shape.
            drop_scores: Float, of the layer's shape; the lowest are dropped.
            grow_scores: Float, of the layer's shape; the highest are grown. ``None`` for the drop scores.
            drop: Number of weights to drop.
            grow: Number of weights to grow.
            regrow_dropped: Whether a weight dropped in this update may be grown again and keeps its value.
            generator: CPU generator that breaks ties.
        """


class DensitySchedule(Protocol):
    """Density over time."""

    def __call__(self, step: int, total_steps: int, final: float) -> float:
        """Return the density after an update at ``step``, in (0, 1]; ``final`` is the method's density."""

    def settles_at(self, total_steps: int) -> int:
        """Return the first step at which the density is ``final`` and stays so."""


@dataclass(frozen=True)
class LayerStat:
    """What a redistribution sees of a layer at an update.

    Attributes:
        weights: Number of weights.
        kept: Number of active weights that the update does not drop.
        strength: The value of the redistribution's ``measure``.
    """

    weights: int
    kept: int
    strength: float


class Redistribution(Protocol):
    """Moves budget between layers at topology updates."""

    @property
    def needs_gradient(self) -> bool:
        """Whether ``measure`` reads the gradient, or the buffer of a grow score that observes."""

    def measure(self, view: LayerView) -> float:
        """Return the strength of a layer's claim to budget, >= 0."""

    def grow_counts(self, stats: Sequence[LayerStat], total: int) -> list[int]:
        """Split ``total`` newly grown weights over the layers."""


class Perturbation(Protocol):
    """Added to the gradients of active weights at every step."""

    def __call__(self, view: LayerView, lr: float) -> Tensor:
        """Return what is added, float, of the layer's shape; values at inactive positions are ignored.

        Args:
            view: The layer; ``gradient`` is ``None``, ``buffer`` the drop score's.
            lr: The optimizer's learning rate for the layer.
        """


class Amount(Protocol):
    """Decides from the weights how many of them an update drops, instead of a fraction."""

    @property
    def initial_state(self) -> float:
        """State at the first update."""

    def counts(self, views: Sequence[LayerView], scores: Sequence[Tensor], state: float) -> tuple[list[int], float]:
        """Return the number of weights to drop in each layer, and the state for the next update.

        Args:
            views: The layers.
            scores: Their drop scores.
            state: The state that the last update returned, or ``initial_state``.
        """


@runtime_checkable
class LossInit(Init, Protocol):
    """An init that scores all layers at once, from the graph of the loss."""

    @property
    def output_scale(self) -> float:
        """Factor of the model's outputs in the step that is scored; that step does not change the weights."""

    def loss_scores(
        self,
        loss: Tensor,
        weights: Sequence[Tensor],
        average: Callable[[Sequence[Tensor]], list[Tensor]],
    ) -> list[Tensor]:
        """Score all positions of all weights, without freeing the graph or setting ``.grad``.

        Args:
            loss: Loss of this process, with its graph.
            weights: Sparse parameters, leaves of that graph.
            average: Averages tensors over processes.

        Returns:
            One float tensor per weight, of its shape, the same on all processes.
        """


@runtime_checkable
class CallInit(Init, Protocol):
    """An init that scores all layers at once, by calls of the model without data."""

    def call_scores(
        self,
        output: Callable[[Sequence[Tensor]], Tensor],
        weights: Sequence[Tensor],
        select: Callable[[Sequence[Tensor], float], list[Tensor]],
    ) -> list[Tensor]:
        """Score all positions of all weights.

        Args:
            output: Returns the sum of the model's outputs (scalar float64, differentiable) on inputs of ones, for the
                weights passed to it and the absolute values of all other parameters.
            weights: Sparse parameters, detached, float64.
            select: Returns masks (bool, one per weight) that keep the best scores, by the method's allocation and
                pattern. The second argument is the progress from the dense network (0) to the method's budget (1).

        Returns:
            One float tensor per weight, of its shape.
        """


def waits_for_batch(init: Init) -> bool:
    """Return whether the first mask depends on the first batch, and so is made in the first step."""
    return init.needs_gradient or isinstance(init, (LossInit, CallInit))


class Fraction(Protocol):
    """Drop fraction: the share of active weights that an update replaces."""

    def __call__(self, step: int, stop: int) -> float:
        """Return the fraction at ``step``, in [0, 1], for updates in steps before ``stop``."""


class Clock(Protocol):
    """Decides at which optimizer steps the topology is updated."""

    def fires(self, step: int, total_steps: int) -> bool:
        """Return whether ``step``, counted from 0, updates the topology."""

    def stop_step(self, total_steps: int) -> int:
        """Return the first step from which on the clock never fires."""
