"""What a run costs on this machine: memory, latency and energy, beside the operations that are counted."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dst.metrics.counting import Example, forward_arguments
from dst.metrics.energy import Energy, EnergyMeter
from dst.metrics.memory import Memory, PeakMemory, activation_bytes, predict_memory
from dst.topology.layers import SparseLayer

MIB = 2**20


class Spent(Callback):
    """Measures memory and energy of a fit by counters that are read at both its ends, at no cost in between.

    Energy goes into checkpoints, so that a resumed run knows what it took before; what was spent between the last checkpoint
    and an interruption is not known. Memory is this process's, the energy that of ``dst.metrics.EnergyMeter``.

    Attributes:
        memory: The fit's peak; None before its end.
        energy: Of all fits so far; None before the first one's end.
        seconds_before: Wall time of training up to the checkpoint that it goes on from.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory: PeakMemory | None = None
        self._peak: PeakMemory | None = None
        self._meter: EnergyMeter | None = None
        self._before = (0.0, 0.0)  # joules and seconds of fits that were resumed, or that ended
        self.seconds_before = 0.0
        self._sources: tuple[str, ...] = ()
        self._estimated = False

    @property
    def energy(self) -> Energy | None:
        """Energy of all fits so far."""
        if self._meter is not None:
            self._read()
        return Energy(*self._before, self._sources, self._estimated) if self._sources else None

    def _read(self) -> None:
        """Add what was spent since the last reading."""
        assert self._meter is not None
        self._meter.__exit__()
        found = self._meter.result
        self._before = self._before[0] + found.joules, self._before[1] + found.seconds
        self._sources, self._estimated = found.sources, self._estimated or found.estimated
        self._meter.__enter__()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin: a checkpoint is loaded by now."""
        device = trainer.strategy.root_device
        self._meter, self._peak = EnergyMeter(device), PeakMemory(device)
        self._peak.__enter__()
        self._meter.__enter__()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """End."""
        if self._meter is None or self._peak is None:
            return
        self._peak.__exit__()
        if self.memory is None or self._peak.peak > self.memory.peak:
            self.memory = self._peak
        self._read()
        self._meter = self._peak = None

    def state_dict(self) -> dict[str, Any]:
        """Energy so far, as plain values."""
        found = self.energy
        if found is None:
            return {}
        return {
            "joules": found.joules,
            "seconds": found.seconds,
            "sources": list(found.sources),
            "estimated": found.estimated,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`'s result."""
        if state_dict:
            self._before = float(state_dict["joules"]), float(state_dict["seconds"])
            self.seconds_before = self._before[1]
            self._sources, self._estimated = tuple(state_dict["sources"]), bool(state_dict["estimated"])


def sum_energy(parts: Sequence[Energy]) -> Energy:
    """Energy of several stretches of work, at least one, by the same meters."""
    total = sum(part.joules for part in parts), sum(part.seconds for part in parts)
    return Energy(*total, parts[0].sources, any(part.estimated for part in parts))


@dataclass(frozen=True)
class Passes:
    """Forward passes that were timed.

    Attributes:
        seconds: Median wall time of one.
        energy: Of one.
        batch_size: Samples in it.
        repeats: How many were timed.
    """

    seconds: float
    energy: Energy
    batch_size: int
    repeats: int


@torch.no_grad()
def time_passes(
    model: nn.Module, example: Example, batch_size: int, *, device: torch.device | str = "cpu", seconds: float = 0.1
) -> Passes:
    """Time forward passes in evaluation mode, for about as long as is asked for and at least three times.

    The model's mode is restored. Take ratios of models measured in turns where machines are noisy; a single figure says
    little.

    Args:
        model: The model, on ``device``.
        example: As in `dst.metrics.count_operations`; its samples are repeated to fill the batch.
        batch_size: Samples of a batch.
        device: Where it runs.
        seconds: About how long to go on.

    Returns:
        The median, and the mean energy.
    """
    device = torch.device(device)
    args, kwargs = batch_of(example, batch_size, next(model.parameters()))
    with evaluating(model):
        for _ in range(2):
            model(*args, **kwargs)
        times: list[float] = []
        with EnergyMeter(device) as meter:
            while len(times) < 3 or sum(times) < seconds:
                start = time.perf_counter()
                model(*args, **kwargs)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append(time.perf_counter() - start)
    return Passes(statistics.median(times), meter.result.per(len(times)), batch_size, len(times))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's own mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def batch_of(example: Example, batch_size: int, like: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of ``forward`` for a batch: the example's samples, repeated, on ``like``'s device."""

    def grow(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        copies = -(-batch_size // value.shape[0])
        return value.repeat(copies, *[1] * (value.ndim - 1))[:batch_size]

    return tree_map(grow, forward_arguments(example, like))


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
