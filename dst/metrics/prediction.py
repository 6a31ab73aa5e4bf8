"""Predicted memory of a training whose layers get their storage later."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from dst.metrics.memory import Memory, activation_bytes, predict_memory
from dst.metrics.passes import Example, batch_of
from dst.topology.layers import SparseLayer


class Prediction:
    """Predicts the memory of a training from its dense model, before `dst.prepare` swaps modules.

    Args:
        module: The dense model. A copy without values is run once; if the copy cannot run, the model itself is.
        example: As in `dst.metrics.count_operations`.
        batch_size: Samples per batch.
        layers: The sparse layers.
    """

    def __init__(self, module: nn.Module, example: Example, batch_size: int, layers: Sequence[SparseLayer]) -> None:
        self.batch_size = batch_size
        self._layers = layers
        self._twin = copy.deepcopy(module).to("meta")
        try:
            self._activations = self._run(self._twin, example)
        except (NotImplementedError, RuntimeError):  # some operators need values
            self._activations = self._run(module, example)

    def _run(self, module: nn.Module, example: Example) -> int:
        args, kwargs = batch_of(example, self.batch_size, next(module.parameters()))
        return activation_bytes(module, kwargs or args)

    def memory(
        self,
        nonzero: Mapping[str, int],
        backends: Mapping[str, str],
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        *,
        dynamic: bool,
    ) -> Memory:
        """Predict the memory of training; see `dst.metrics.predict_memory`.

        Args:
            nonzero: Label -> number of active weights.
            backends: Label -> backend of the layer.
            optimizer: Returns the optimizer of given parameters.
            dynamic: Whether the topology is updated.
        """
        named = dict(self._twin.named_parameters())
        active: dict[str, int] = {}
        for layer in self._layers:  # several may share a parameter, whose other parts are dense
            before = active.get(layer.parameter, named[layer.parameter].numel())
            active[layer.parameter] = before - layer.weights + nonzero[layer.label]
        return predict_memory(
            self._twin,
            (),
            active,
            backend={layer.parameter: backends[layer.label] for layer in self._layers},
            optimizer=optimizer(self._twin.parameters()),
            dynamic=dynamic,
            activations=self._activations,
        )
