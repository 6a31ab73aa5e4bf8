"""The interface of a backend."""

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
    """The scores of one layer and their inputs.

    Attributes:
        scores: The ``"drop"`` score, and the ``"grow"`` score of methods that grow weights.
        buffers: Role to the last result of the score's ``observe``, for scores that observe.
        generator: Maps a role, or ``"ties"``, to a new CPU generator seeded by seed, step, layer and role.
    """

    scores: Mapping[str, Score]
    buffers: Mapping[str, Tensor]
    generator: Callable[[str], torch.Generator]


class Storage(ABC):
    """Holds the weights and masks of some sparse parameters.

    Names are parameter names of the dense model, and positions are row-major in the dense layer. Methods that a backend
    does not need have a default that does nothing.
    """

    backend: ClassVar[str]
    """Name of the backend: ``masked``, ``latent`` or ``csr``."""
    is_prepared: ClassVar[bool] = False
    """Whether ``dst.prepare`` created the layers with their first mask."""
    parameters: Mapping[str, nn.Parameter]
    """Name to the parameter that the optimizer holds."""
    active: dict[str, int]
    """Layer label to number of active weights."""

    # -- masks and weights -----------------------------------------------------------------------------------------

    @abstractmethod
    def masks(self) -> dict[str, Tensor]:
        """Name to bool mask of the dense shape. The mask of a DTensor parameter is a DTensor."""

    def mask_of(self, name: str) -> Tensor | None:
        """The mask of this rank's shard of a parameter; ``None`` if the backend stores no inactive weights."""
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
        """The view of a layer at its dense shape."""

    def set_mask(self, positions: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Set the masks, given as layer label to sorted positions, and zero inactive weights."""

    @abstractmethod
    def rescale(self, layer: SparseLayer) -> None:
        """Scale each output's weights by sqrt(fan-in / active fan-in)."""

    # -- a topology update ----------------------------------------------------------------------------------------

    @abstractmethod
    def decide(self, update: LayerUpdate, scoring: Scoring) -> Rewiring | None:
        """Select the weights that an update of a layer drops and grows. ``None`` if a gradient is missing."""

    @abstractmethod
    def apply(self, layer: SparseLayer, rewiring: Rewiring, optimizer: Optimizer) -> None:
        """Apply an update. Dropped and grown weights and their optimizer state are set to zero.

        The gradient afterwards belongs to the new mask. It includes grown weights if a dense gradient was expected.
        """

    # -- an optimizer step ----------------------------------------------------------------------------------------

    def expect_dense_gradient(self, parameters: Collection[nn.Parameter], expected: bool) -> None:  # noqa: B027
        """Set whether the next step needs gradients of inactive weights. Called before its forward pass."""

    def mask_gradients(self, parameters: Iterable[nn.Parameter]) -> None:  # noqa: B027
        """Set the gradients of inactive weights to zero."""

    def mask_weights(self, parameters: Iterable[nn.Parameter]) -> None:  # noqa: B027
        """Set inactive weights to zero."""

    def mask_optimizer_state(self, optimizer: Optimizer) -> None:  # noqa: B027
        """Set the optimizer state of inactive weights to zero."""

    def begin_step(self, optimizer: Optimizer, parameters: Collection[nn.Parameter]) -> None:  # noqa: B027
        """Prepare parameters and gradients for the optimizer step. A second call has no effect."""

    def end_step(self, parameters: Collection[nn.Parameter], step: int, steps: int) -> None:
        """Prepare parameters for the forward pass after the optimizer step. Inactive weights are zero.

        Args:
            parameters: The parameters of the optimizer.
            step: Number of the next step.
            steps: The step at which the first mask is chosen.
        """
        self.mask_weights(parameters)

    def release(self) -> None:  # noqa: B027
        """Prepare the model for use without this storage."""

    # -- gradients outside the parameters --------------------------------------------------------------------------

    def collected_is_finite(self, parameters: Collection[nn.Parameter]) -> bool:
        """Whether the gradients stored outside the parameters are finite."""
        return True

    def collected_state(self) -> dict[str, list[list[Tensor]]]:
        """The gradients stored outside the parameters, for a checkpoint during gradient accumulation."""
        return {}

    def load_collected(self, collected: Mapping[str, list[list[Tensor]]]) -> None:  # noqa: B027
        """Continue from ``collected_state``. No effect if the next step does not need these gradients."""

    # -- latent weights --------------------------------------------------------------------------------------------

    def latent_shapes(self, masked: bool) -> dict[str, tuple[int, ...]]:
        """Names and shapes of ``state()["latent"]``, before or after the first mask is chosen (``masked``)."""
        return {}

    # -- copies, exploration and checkpoints ----------------------------------------------------------------------

    @abstractmethod
    def track_average(self, model: nn.Module) -> None:
        """Apply the masks to a copy of the model from now on. The copy must have all parameters."""

    @abstractmethod
    def explore(self) -> None:
        """Start recording which weights have ever been active."""

    @abstractmethod
    def explored(self, layer: SparseLayer) -> float:
        """Number of weights of a layer that have ever been active."""

    @abstractmethod
    def signatures(self) -> Iterable[tuple[str, Tensor]]:
        """Name and a tensor that identifies the mask, to compare ranks. Sharded parameters are left out."""

    @abstractmethod
    def state(self) -> dict[str, dict[str, Tensor]]:
        """The state for a checkpoint; each entry is a mapping by name.

        ``masks``: whole bool tensors, or sorted positions. ``union``: the weights that have ever been active, after a call
        of ``explore``. ``latent``: latent weights and learned tensors of the relaxation.
        """

    @abstractmethod
    def load(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Continue at ``step`` from a ``state`` of any backend."""


def is_finite(tensor: Tensor) -> bool:
    """Whether all entries are finite. Tests the sum first, which takes a single pass."""
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce().values()
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
