"""The first mask: when it is made, from what, and how it is undone when a saved state replaces it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dst.backends.storage import is_finite
from dst.backends.storages import Storages
from dst.engine.first_batch import FirstBatch
from dst.engine.saved_state import check_prepared
from dst.engine.steps import OptimizerSteps
from dst.engine.training import Training
from dst.errors import ConfigurationError, StateError
from dst.method import Method
from dst.pieces.init import FromFile
from dst.pieces.protocols import CallInit, LossInit, waits_for_batch
from dst.planning.first_mask import first_positions, masks_on_the_way, positions_in_file
from dst.topology.layers import SparseLayer
from dst.topology.optimizer_state import per_weight_state
from dst.topology.sharding import local

_Place: TypeAlias = tuple[int, int, str | None]
"""Numbers of an optimizer and of its parameter, and the name of a tensor in the optimizer's state of it."""


class FirstMask:
    """Makes the first mask of a training, at construction or at the step where it is due.

    Inits that need a batch read the step at ``sparsify_at``: its gradients, its loss (``LossInit``) or the model's call
    (``CallInit``). A mask made at construction sets weights to zero that may have been loaded from a checkpoint before.
    They are kept until the first step, so that loading a saved state restores them.

    Args:
        training: The training.
        model: The model, unwrapped.
        unsupported: Layer label to why the method's backend cannot store it, or ``None`` where it can.
    """

    def __init__(self, training: Training, model: nn.Module, unsupported: Mapping[str, str | None]) -> None:
        self._training, self._unsupported = training, unsupported
        self._originals: list[tuple[_Place, Tensor, Tensor, int]] = []  # place, tensor, its copy, its version
        self._copied: list[tuple[_Place, Tensor]] = []  # place and copy, in a copy of this object
        self._batch: FirstBatch | None = None
        init = training.method.init
        if not training.state.sparsified and isinstance(init, (LossInit, CallInit)):
            self._batch = FirstBatch(model, training.layers, init, self.is_due, training.group)
            self._batch.watch()

    def is_due(self) -> bool:
        """Whether the coming step of the first optimizer makes it."""
        return self._due_at(self._training.steppers[0])

    def _due_at(self, stepper: OptimizerSteps) -> bool:
        return not self._training.state.sparsified and stepper.step >= stepper.mask_step

    def make_at_construction(self) -> None:
        """Make the mask, and keep the weights that it cuts until ``forget_originals``."""
        kept = [(place, tensor, tensor.clone()) for place, tensor in self._cut()]
        self._make(0)
        self._originals = [(place, tensor, copy, tensor._version) for place, tensor, copy in kept]

    def make_if_due(self, stepper: OptimizerSteps) -> bool:
        """Make the mask if it is due at an optimizer's coming step.

        Returns:
            Whether it replaces the step, whose gradients are those of the dense network.
        """
        if not self._due_at(stepper):
            return False
        training = self._training
        if not waits_for_batch(training.method.init):
            self._make(stepper.step)
            return False
        usable = training.gradients_are_usable(stepper, every_layer=training.method.init.needs_gradient)
        given = self._scores_of_batch() if usable else None
        # Scores of a batch that cannot be used are dropped; the next batch is measured anew.
        training.state.buffers = {key: held for key, held in training.state.buffers.items() if key[0] != "init"}
        if not usable or (given is not None and not all(is_finite(score) for score in given.values())):
            return False
        self._make(stepper.step, given)
        return True

    def score_loss(self, loss: Tensor) -> None:
        """Score the network from the graph of the loss, if the init needs it and the mask is due.

        With gradient accumulation the first loss of the step counts.
        """
        if self._batch is None or not isinstance(self._training.method.init, LossInit) or not self.is_due():
            return
        buffers = self._training.state.buffers
        if not any(role == "init" for role, _ in buffers):
            buffers.update({("init", label): score for label, score in self._batch.scores_of_loss(loss).items()})

    def watch(self) -> None:
        """Watch the model's calls exactly as long as there is no mask."""
        if self._batch is not None:
            self._batch.close() if self._training.state.sparsified else self._batch.watch()

    def close(self) -> None:
        """End watching the model's calls."""
        if self._batch is not None:
            self._batch.close()

    def _make(self, step: int, given: Mapping[str, Tensor] | None = None) -> None:
        """Make the mask, from given scores where the init scores the whole network."""
        training = self._training
        method, storages = training.method, training.storages
        storages.set_mask(
            choose_first_mask(
                method,
                training.layers,
                storages,
                seed=training.seed,
                step=step,
                total_steps=training.steppers[0].total,
                given=given,
                unsupported=self._unsupported,
            )
        )
        if method.rescale_init:
            for layer in training.layers:
                storages.rescale(layer)
        for stepper in training.steppers:
            storages.mask_optimizer_state(stepper.optimizer)
        training.check_agreement(step)
        training.state.budgets = {layer.label: storages.active(layer) for layer in training.layers}
        training.state.sparsified = True
        self.watch()
        if method.is_dynamic:
            storages.explore()

    def _scores_of_batch(self) -> dict[str, Tensor] | None:
        """Layer label to scores, if the init scores the whole network; else ``None``."""
        if self._batch is None:
            return None
        method, layers, seed = self._training.method, self._training.layers, self._training.seed
        if isinstance(method.init, CallInit):
            return self._batch.scores_of_call(
                lambda scores, progress: masks_on_the_way(method, layers, scores, progress, seed=seed)
            )
        scores = {label: held for (role, label), held in self._training.state.buffers.items() if role == "init"}
        if not scores:
            raise StateError(
                f"{type(method.init).__name__} needs the loss with its graph: call "
                "sparsifier.before_backward(loss) before loss.backward()"
            )
        return scores

    # -- what the mask cut ----------------------------------------------------------------------------------------

    def _cut(self) -> Iterator[tuple[_Place, Tensor]]:
        """The weights and per-weight optimizer states that making the mask changes, and where they are."""
        training = self._training
        for i, stepper in enumerate(training.steppers):
            for k, parameter in enumerate(stepper.parameters):
                prepared = training.storages.is_prepared(training.name_of(parameter))
                if training.method.rescale_init or not prepared:
                    yield (i, k, None), local(parameter.detach())
                    for key, value in per_weight_state(stepper.optimizer, parameter):
                        yield (i, k, key), local(value)

    def restore_originals(self) -> None:
        """Restore the weights that the mask cut, unless they were written since."""
        for _, tensor, original, version in self._originals:
            if tensor._version == version:
                tensor.copy_(original)
        self._originals = []

    def forget_originals(self) -> None:
        """Drop the kept weights: training continues with the mask."""
        self._originals = []

    def __getstate__(self) -> dict[str, Any]:
        """Keep the cut weights by place: a copy has other tensors with other versions."""
        current = dict(self._cut()) if self._originals else {}
        kept = [
            (place, original)
            for place, tensor, original, version in self._originals
            if tensor._version == version and place in current and current[place].data_ptr() == tensor.data_ptr()
        ]
        return {**self.__dict__, "_originals": [], "_copied": kept}

    def attach_to_copy(self) -> None:
        """Find the tensors of the copied training that the kept weights belong to."""
        current = dict(self._cut()) if self._copied else {}
        self._originals = [(place, current[place], copy, current[place]._version) for place, copy in self._copied]
        self._copied = []


def choose_first_mask(
    method: Method,
    layers: Sequence[SparseLayer],
    storages: Storages,
    *,
    seed: int,
    step: int,
    total_steps: int,
    given: Mapping[str, Tensor] | None,
    unsupported: Mapping[str, str | None],
) -> dict[str, Tensor]:
    """Choose the first active weights of all layers and change nothing.

    Args:
        method: The method.
        layers: All sparse layers.
        storages: Their storages.
        seed: Seeds random choices.
        step: The optimizer step.
        total_steps: Steps of the whole training.
        given: Layer label to scores, of inits that score the whole network.
        unsupported: Layer label to why the method's backend cannot store it, or ``None`` where it can.

    Returns:
        Layer label to sorted positions. Prepared layers may be left out.

    Raises:
        ConfigurationError: A layer should have been prepared, or was prepared with another budget.
        StateError: The mask file does not fit the model.
    """
    if isinstance(method.init, FromFile):
        shapes = {name: storages.shape(name) for name in storages.parameters}
        found = positions_in_file(method, layers, method.init.path, shapes)
        kept: dict[str, list[Tensor]] = {}
        for layer in (x for x in layers if storages.is_prepared(x.parameter)):
            kept.setdefault(layer.parameter, []).append(found[layer.label] + layer.offset)
        check_prepared(
            {name: torch.cat(parts) for name, parts in kept.items()}, f"mask file {method.init.path}", storages
        )
        chosen: list[tuple[SparseLayer, int, Tensor | None]] = [
            (layer, found[layer.label].numel(), found[layer.label]) for layer in layers
        ]
    else:
        needs_gradient = method.init.needs_gradient
        prepared = [layer.label for layer in layers if storages.is_prepared(layer.parameter)]
        chosen = list(
            first_positions(
                method,
                layers,
                lambda layer, generator: storages.view(layer, generator, gradient=needs_gradient),
                seed=seed,
                step=step,
                density=method.density_at(step, total_steps),
                prepared=prepared,
                given=given,
            )
        )
    for layer, count, _ in chosen:
        if not storages.is_prepared(layer.parameter):
            _check_storage(method, layer, count, unsupported)
        elif not method.allocation.needs_scores and count != storages.active(layer):
            raise ConfigurationError(
                f"{layer.parameter} was prepared with {storages.active(layer)} connections, and the method gives it "
                f"{count}: pass the same method, include and exclude to dst.prepare"
            )
    return {layer.label: positions for layer, _, positions in chosen if positions is not None}


def _check_storage(method: Method, layer: SparseLayer, count: int, unsupported: Mapping[str, str | None]) -> None:
    """Raise for a layer that should have been prepared."""
    if count < layer.weights and unsupported.get(layer.label, "") is None:
        raise ConfigurationError(
            f'{layer.parameter} has ordinary weights, and the method has backend="{method.backend}": call '
            "model = dst.prepare(model, method) before the optimizer is built, with the same include and exclude"
        )
