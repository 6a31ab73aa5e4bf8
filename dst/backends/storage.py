"""What the engine asks of the storage of weights; one class per backend gives it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dst.pieces.protocols import LayerView, Score
from dst.planning.update import LayerUpdate
from dst.topology.layers import SparseLayer
from dst.topology.rewiring import Rewiring


@dataclass(frozen=True)
class Scoring:
    """What a storage scores the weights of one layer with.

    Attributes:
        scores: ``drop``, and ``grow`` where weights ever grow.
        buffers: Role to what the score's ``observe`` returned last; only of scores that observe.
        generator: Role, or ``"ties"``, to a fresh CPU generator folded from seed, step, layer and it.
    """

    scores: Mapping[str, Score]
    buffers: Mapping[str, Tensor]
    generator: Callable[[str], torch.Generator]


class Storage(ABC):
    """The weights of some sparse parameters and which of them are active.

    Parameters go by the name that they have in the dense model, and positions are row-major in a layer of its shape. What a
    backend has no use for has a default that does nothing.
    """

    backend: ClassVar[str]
    """Its name: ``masked``, ``latent`` or ``csr``."""
    is_prepared: ClassVar[bool] = False
    """Whether ``dst.prepare`` made the layers with their first connections."""
    parameters: Mapping[str, nn.Parameter]
    """Name to the parameter that the optimizer holds."""
    active: dict[str, int]
    """Layer label to its number of active weights."""

    # -- what is active -------------------------------------------------------------------------------------------

    @abstractmethod
    def masks(self) -> dict[str, Tensor]:
        """Name to bool mask of the dense shape (a DTensor for a parameter that is one)."""

    def mask_of(self, name: str) -> Tensor | None:
        """The mask of this process's part of a parameter; ``None`` where the parameter holds no inactive weights."""
        return None

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the dense weight."""

    @abstractmethod
    def view(
        self,
        layer: SparseLayer,
        generator: torch.Generator,
        *,
        gradient: bool = False,
        buffer: Tensor | None = None,
    ) -> LayerView:
        """The layer at its dense shape, for what looks at every position."""

    def set_mask(self, positions: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Take over connections: layer label to sorted positions. Inactive weights are zero then."""

    @abstractmethod
    def rescale(self, layer: SparseLayer) -> None:
        """Scale each output's weights by sqrt(fan-in / active fan-in)."""

    # -- a topology update ----------------------------------------------------------------------------------------

    @abstractmethod
    def decide(self, update: LayerUpdate, scoring: Scoring) -> Rewiring | None:
        """Select what an update of a layer drops and grows, and change nothing; ``None`` where a gradient that it needs is missing."""

    @abstractmethod
    def apply(self, layer: SparseLayer, rewiring: Rewiring, optimizer: Optimizer) -> None:
        """Make an update: weights and optimizer state are zero where it changed, and go on where it did not.

        The gradient fits the new connections afterwards, those that have grown included where it was expected.
        """

    # -- an optimizer step ----------------------------------------------------------------------------------------

    def expect_dense_gradient(self, parameters: Collection[nn.Parameter], expected: bool) -> None:  # noqa: B027
        """Announce whether the step to come reads gradients of inactive weights; called before its forward pass."""

    def mask_gradients(self, parameters: Iterable[nn.Parameter]) -> None:  # noqa: B027
        """Set gradients of inactive weights to zero."""

    def mask_weights(self, parameters: Iterable[nn.Parameter]) -> None:  # noqa: B027
        """Set inactive weights to zero."""

    def mask_optimizer_state(self, optimizer: Optimizer) -> None:  # noqa: B027
        """Set an optimizer's state of inactive weights to zero."""

    def begin_step(self, optimizer: Optimizer, parameters: Collection[nn.Parameter]) -> None:  # noqa: B027
        """Let parameters and gradients be what the optimizer moves, as its step begins; without effect a second time."""

    def end_step(self, parameters: Collection[nn.Parameter], step: int, steps: int) -> None:
        """Let parameters be what the network computes with, behind the optimizer's step: inactive weights are zero.

        Args:
            parameters: The optimizer's.
            step: The number of the step to come.
            steps: When the first mask is made.
        """
        self.mask_weights(parameters)

    def release(self) -> None:  # noqa: B027
        """Leave the model as it is to be used without this storage."""

    # -- gradients that are kept outside parameters ---------------------------------------------------------------

    def collected_is_finite(self, parameters: Collection[nn.Parameter]) -> bool:
        """Whether what stands for gradients of inactive weights, where parameters hold none, is finite."""
        return True

    def collected_state(self) -> dict[str, list[list[Tensor]]]:
        """That, for a checkpoint in the middle of an accumulated step."""
        return {}

    def load_collected(self, collected: Mapping[str, list[list[Tensor]]]) -> None:  # noqa: B027
        """Go on from ``collected_state``; without effect where the coming step does not need it."""

    # -- weights that are kept beside parameters ------------------------------------------------------------------

    def latent_shapes(self, masked: bool) -> dict[str, tuple[int, ...]]:
        """The names and shapes of ``state()["latent"]``, before or after the first mask is made."""
        return {}

    # -- copies, exploration and checkpoints ----------------------------------------------------------------------

    @abstractmethod
    def track_average(self, model: nn.Module) -> None:
        """Keep a copy of the model on the same connections from now on; refuse one that lacks a parameter."""

    @abstractmethod
    def explore(self) -> None:
        """Count from now on which connections have ever been active."""

    @abstractmethod
    def explored(self, layer: SparseLayer) -> float:
        """How many connections of a layer have ever been active."""

    @abstractmethod
    def signatures(self) -> Iterable[tuple[str, Tensor]]:
        """Name and a tensor, equal on processes whose masks are; only for parameters that all processes hold whole."""

    @abstractmethod
    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, each a mapping by name.

        ``masks``: whole bool tensors, or sorted positions. ``union``: the weights that have ever been active, once
        ``explore`` was called. ``latent``: what is kept beside the parameters.
        """

    @abstractmethod
    def load(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Continue at ``step`` from the ``state`` of storages of this backend or another."""


def is_finite(tensor: Tensor) -> bool:
    """Whether every entry is finite; the sum settles it in one pass unless it overflows."""
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce().values()
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
