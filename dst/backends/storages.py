"""The storages of all sparse layers of a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from dst.backends.storage import Scoring, Storage
from dst.pieces.protocols import LayerView
from dst.planning.update import LayerUpdate
from dst.topology.layers import SparseLayer
from dst.topology.rewiring import Rewiring
from dst.topology.sharding import check_equal_masks


class Storages:
    """Delegates calls for one layer to its storage, and calls for the model to all storages.

    Args:
        storages: The storages.
        layers: All sparse layers. ``parameters`` and ``masks`` have their order.

    Attributes:
        parameters: Name in the dense model to the parameter that the optimizer holds.
    """

    def __init__(self, storages: Iterable[Storage], layers: Sequence[SparseLayer]) -> None:
        self._storages = tuple(storages)
        self._by_name = {name: storage for storage in self._storages for name in storage.parameters}
        self.parameters: dict[str, nn.Parameter] = {
            layer.parameter: self._by_name[layer.parameter].parameters[layer.parameter] for layer in layers
        }
        self._names = {parameter: name for name, parameter in self.parameters.items()}

    def __iter__(self) -> Iterator[Storage]:
        return iter(self._storages)

    # -- one layer or parameter -----------------------------------------------------------------------------------

    def of(self, layer: SparseLayer) -> Storage:
        """The storage of a layer."""
        return self._by_name[layer.parameter]

    def name_of(self, parameter: nn.Parameter) -> str | None:
        """Name of a parameter in the dense model; ``None`` if it has no sparse layer."""
        return self._names.get(parameter)

    def parameter(self, layer: SparseLayer) -> nn.Parameter:
        """The parameter that holds a layer."""
        return self.parameters[layer.parameter]

    def backend(self, layer: SparseLayer) -> str:
        """The name of a layer's backend."""
        return self.of(layer).backend

    def is_prepared(self, name: str) -> bool:
        """Whether ``dst.prepare`` chose the first mask of a parameter."""
        return self._by_name[name].is_prepared

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter in the dense model."""
        return self._by_name[name].shape(name)

    def active(self, layer: SparseLayer) -> int:
        """Number of active weights of a layer."""
        return self.of(layer).active[layer.label]

    def mask_of(self, parameter: nn.Parameter) -> Tensor | None:
        """The mask of this rank's shard of a parameter; ``None`` if the backend stores no inactive weights."""
        name = self._names.get(parameter)
        return None if name is None else self._by_name[name].mask_of(name)

    def view(
        self, layer: SparseLayer, generator: torch.Generator, *, gradient: bool = False, buffer: Tensor | None = None
    ) -> LayerView:
        """The view of a layer at its dense shape."""
        return self.of(layer).view(layer, generator, gradient=gradient, buffer=buffer)

    def weight(self, layer: SparseLayer) -> Tensor:
        """The weights of a layer at its dense shape, zero where inactive."""
        return self.of(layer).view(layer, torch.Generator()).weight

    def rescale(self, layer: SparseLayer) -> None:
        """Scale each output's weights by sqrt(fan-in / active fan-in)."""
        self.of(layer).rescale(layer)

    def explored(self, layer: SparseLayer) -> float:
        """Number of weights of a layer that have ever been active."""
        return self.of(layer).explored(layer)

    def decide(self, update: LayerUpdate, scoring: Scoring) -> Rewiring | None:
        """Select the weights that an update of a layer drops and grows. ``None`` if a gradient is missing."""
        return self.of(update.layer).decide(update, scoring)

    def apply(self, layer: SparseLayer, rewiring: Rewiring, optimizer: Optimizer) -> None:
        """Apply an update to a layer."""
        self.of(layer).apply(layer, rewiring, optimizer)

    # -- all layers -----------------------------------------------------------------------------------------------

    @property
    def any_prepared(self) -> bool:
        """Whether ``dst.prepare`` chose the first mask of any layer."""
        return any(storage.is_prepared for storage in self)

    def masks(self) -> dict[str, Tensor]:
        """Name to bool mask of the dense shape."""
        found = {name: mask for storage in self for name, mask in storage.masks().items()}
        return {name: found[name] for name in self.parameters}

    def set_mask(self, positions: Mapping[str, Tensor]) -> None:
        """Set the masks, given as layer label to sorted positions."""
        for storage in self:
            storage.set_mask(positions)

    def check_agreement(self, step: int, group: ProcessGroup | None) -> None:
        """Check that replicated masks are equal on all ranks."""
        check_equal_masks((signature for storage in self for signature in storage.signatures()), step, group)

    def explore(self) -> None:
        """Start recording which weights have ever been active."""
        for storage in self:
            storage.explore()

    def track_average(self, model: nn.Module) -> None:
        """Apply the masks to a copy of the model from now on."""
        for storage in self:
            storage.track_average(model)

    # -- an optimizer step ----------------------------------------------------------------------------------------

    def expect_dense_gradient(self, parameters: Collection[nn.Parameter], expected: bool) -> None:
        """Set whether the next step needs gradients of inactive weights."""
        for storage in self:
            storage.expect_dense_gradient(parameters, expected)

    def collected_is_finite(self, parameters: Collection[nn.Parameter]) -> bool:
        """Whether the gradients stored outside the parameters are finite."""
        return all(storage.collected_is_finite(parameters) for storage in self)

    def mask_gradients(self, parameters: Collection[nn.Parameter]) -> None:
        """Set the gradients of inactive weights to zero."""
        for storage in self:
            storage.mask_gradients(parameters)

    def mask_optimizer_state(self, optimizer: Optimizer) -> None:
        """Set the optimizer state of inactive weights to zero."""
        for storage in self:
            storage.mask_optimizer_state(optimizer)

    def begin_step(self, optimizer: Optimizer, parameters: Collection[nn.Parameter]) -> None:
        """Prepare parameters and gradients for the optimizer step."""
        for storage in self:
            storage.begin_step(optimizer, parameters)

    def end_step(self, parameters: Collection[nn.Parameter], step: int, mask_step: int) -> None:
        """Prepare parameters for the forward pass. Inactive weights are zero."""
        for storage in self:
            storage.end_step(parameters, step, mask_step)

    @torch.no_grad()
    def release(self) -> None:
        """Prepare the model for use without storages. Inactive weights are zero."""
        parameters = list(self.parameters.values())
        for storage in self:
            storage.mask_weights(parameters)
            storage.expect_dense_gradient(parameters, False)
            storage.release()

    # -- saving and loading ---------------------------------------------------------------------------------------

    def state(self) -> dict[str, dict[str, Any]]:
        """The state for a checkpoint: ``masks``, ``union`` and ``latent``, each by name."""
        states = [storage.state() for storage in self]
        return {key: {n: t for state in states for n, t in state[key].items()} for key in ("masks", "union", "latent")}

    def latent_shapes(self, masked: bool) -> dict[str, tuple[int, ...]]:
        """Names and shapes of ``latent``, before or after the first mask is chosen (``masked``)."""
        return {name: shape for storage in self for name, shape in storage.latent_shapes(masked).items()}

    def load(self, state: Mapping[str, Any], step: int) -> None:
        """Continue at ``step`` from ``state``."""
        for storage in self:
            storage.load(state, step)

    def collected_state(self) -> dict[str, list[list[Tensor]]]:
        """The gradients stored outside the parameters, for a checkpoint during gradient accumulation."""
        return {name: held for storage in self for name, held in storage.collected_state().items()}

    def load_collected(self, collected: Mapping[str, list[list[Tensor]]]) -> None:
        """Continue from ``collected_state``. Call it after ``expect_dense_gradient``."""
        for storage in self:
            storage.load_collected(collected)
