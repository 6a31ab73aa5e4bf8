"""Predicted memory of a training whose layers may change storage before it starts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from dst.metrics.memory import Memory, activation_bytes, predict_memory
from dst.metrics.passes import Example, batch_of
from dst.topology.layers import SparseLayer


class Prediction:
    """Predicts the memory of a training from its model as it was before modules were swapped.

    Args:
        module: The dense model. It is copied without values, and run once if the copy cannot be.
        example: As in `dst.metrics.count_operations`.
        batch_size: Samples of a batch.
        layers: The sparse layers.
    """

    def __init__(self, module: nn.Module, example: Example, batch_size: int, layers: Sequence[SparseLayer]) -> None:
        self.batch_size = batch_size
        self._layers = layers
        self._twin = copy.deepcopy(module).to("meta")
        try:
            self._activations = self._run(self._twin, example)
        except (NotImplementedError, RuntimeError):  # operators that need values
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
        """Predict what training takes; see `dst.metrics.predict_memory`.

        Args:
            nonzero: Label to active weights.
            backends: Label to where its weights live.
            optimizer: Makes the optimizer.
            dynamic: Whether the topology moves.
        """
        named = dict(self._twin.named_parameters())
        active: dict[str, int] = {}
        for layer in self._layers:  # several may be parts of one parameter, whose other parts are dense
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
