"""What a run cost on this machine: memory, latency and energy, beside the operations that are counted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dst.metrics.energy import EnergyMeter
from dst.metrics.memory import PeakMemory


@dataclass
class Measured:
    """What a ``with measured(...)`` block cost; filled in as it ends.

    Attributes:
        memory: ``peak_mb`` of the process, ``increase_mb`` above what it had before, and what was read (``source``).
        energy: ``joules``, ``joules_per_step`` where steps are known, whether it is an estimate, and of what.
    """

    memory: dict[str, float | str] = field(default_factory=dict)
    energy: dict[str, float | str | bool] = field(default_factory=dict)

    def per_step(self, steps: int) -> None:
        """Divide the energy by the number of optimizer steps."""
        if steps > 0 and "joules" in self.energy:
            self.energy["joules_per_step"] = float(self.energy["joules"]) / steps


@contextmanager
def measured(device: torch.device | str = "cpu") -> Iterator[Measured]:
    """Measure memory and energy of a block by counters that are read at both its ends, at no cost in between.

    Args:
        device: Where the model is.

    Yields:
        What becomes the measurement.
    """
    result = Measured()
    with PeakMemory(device) as memory, EnergyMeter(device) as energy:
        yield result
    result.memory = {
        "peak_mb": memory.peak / 2**20,
        "increase_mb": memory.increase / 2**20,
        "source": memory.source,
    }
    found = energy.result
    result.energy = {
        "joules": found.joules,
        "estimated": found.estimated,
        "source": "; ".join(found.sources),
    }


@torch.no_grad()
def latency(model: nn.Module, example: Tensor, *, repeats: int = 30, warmup: int = 5) -> float:
    """Median wall time of a forward pass in evaluation mode, in seconds.

    The model's mode is restored. Take ratios of models measured in turns where machines are noisy; a single figure
    says little.

    Args:
        model: The model.
        example: A batch, on the model's device.
        repeats: Timed passes.
        warmup: Passes before.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    times = []
    try:
        for i in range(warmup + repeats):
            _wait(example.device)
            start = time.perf_counter()
            model(example)
            _wait(example.device)
            if i >= warmup:
                times.append(time.perf_counter() - start)
    finally:
        for module, training in modes:
            module.training = training
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
