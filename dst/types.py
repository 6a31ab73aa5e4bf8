"""The small vocabulary that the pieces of a method share: durations, views and protocols."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from dst.errors import ConfigurationError

Duration: TypeAlias = int | float
"""A point or a span in training: an ``int`` counts optimizer steps, a ``float`` in [0, 1] is a fraction of the
total steps. ``1`` is therefore one step and ``1.0`` is the whole training."""


def resolve_steps(duration: Duration, total_steps: int, name: str = "duration") -> int:
    """Turn a duration into optimizer steps.

    Args:
        duration: Steps (``int``, >= 0) or a fraction of ``total_steps`` (``float`` in [0, 1]).
        total_steps: Optimizer steps of the whole training.
        name: What the duration is called in an error message.

    Returns:
        The number of steps; fractions are rounded to the nearest step.

    Raises:
        ConfigurationError: A negative duration, or a fraction outside [0, 1].
    """
    check_duration(duration, name)
    return duration if isinstance(duration, int) else round(duration * total_steps)


def check_duration(duration: Duration, name: str) -> None:
    """Raise ``ConfigurationError`` unless ``duration`` is an ``int`` >= 0 or a ``float`` in [0, 1]."""
    if isinstance(duration, bool) or not isinstance(duration, (int, float)):
        raise ConfigurationError(f"{name}={duration!r}: give steps (int) or a fraction of training (float)")
    if duration < 0 or (isinstance(duration, float) and not duration <= 1):
        raise ConfigurationError(
            f"{name}={duration!r}: a float is a fraction of the total steps and lies in [0, 1]; "
            "give an int for a number of steps"
        )


def folded_generator(*keys: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on the keys alone.

    Folding (seed, step, layer, purpose) into a fresh generator, instead of drawing from one long stream, makes every
    random choice independent of what was drawn before: the same after a resume, and the same on every rank.
    """
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))


@dataclass(frozen=True)
class LayerView:
    """What a score may look at; all tensors have the layer's shape.

    Attributes:
        weight: The layer's weights, detached; zeros where inactive.
        mask: Bool, True where active.
        gradient: The dense gradient (accumulated, reduced over ranks, unscaled, unclipped), or ``None`` where the
            score did not ask for it.
        buffer: What the score's ``observe`` returned last, or ``None``.
        generator: A CPU generator folded from seed, step and layer, for random scores.
    """

    weight: Tensor
    mask: Tensor
    gradient: Tensor | None
    buffer: Tensor | None
    generator: torch.Generator


@runtime_checkable
class Score(Protocol):
    """Ranks connections: higher is better, for survival as for growth."""

    @property
    def needs_gradient(self) -> bool:
        """Whether ``__call__`` reads ``view.gradient``."""

    @property
    def observes(self) -> bool:
        """Whether ``observe`` must be called at every step."""

    def __call__(self, view: LayerView) -> Tensor:
        """Score every position of the layer; float, of the layer's shape."""

    def observe(self, buffer: Tensor | None, gradient: Tensor) -> Tensor:
        """Return the buffer after seeing this step's dense gradient; may update ``buffer`` in place."""


@runtime_checkable
class Sampler(Protocol):
    """A score or init whose best connections are a uniform draw: it needs no number for every position."""

    def sample(self, size: int, barred: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Draw ``count`` of ``size`` positions but the barred (sorted, int64); sorted, on the device of ``barred``."""


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
