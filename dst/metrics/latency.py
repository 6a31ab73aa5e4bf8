"""Latency and energy of forward passes on this machine."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from dst.metrics.energy import Energy, EnergyMeter
from dst.metrics.passes import Example, batch_of
from dst.topology.evaluation import evaluation_mode


@dataclass(frozen=True)
class Passes:
    """Timed forward passes.

    Attributes:
        seconds: Median wall time of one pass, in seconds.
        energy: Mean energy of one pass; None without a counter, or if the counter did not move.
        batch_size: Samples per pass.
        repeats: Number of timed passes.
    """

    seconds: float
    energy: Energy | None
    batch_size: int
    repeats: int


@torch.no_grad()
def time_passes(
    model: nn.Module, example: Example, batch_size: int, *, device: torch.device | str = "cpu", seconds: float = 0.1
) -> Passes:
    """Time forward passes in evaluation mode, for about ``seconds`` and at least three times.

    The model's mode is restored. On a noisy machine a single figure means little: measure the models in turns and compare
    their ratios.

    Args:
        model: The model, on ``device``.
        example: As in `dst.metrics.count_operations`. Its samples are repeated to fill the batch.
        batch_size: Samples per pass.
        device: Device of the model.
        seconds: Approximate time to measure, in seconds.

    Returns:
        The median latency and the mean energy.
    """
    device = torch.device(device)
    args, kwargs = batch_of(example, batch_size, next(model.parameters()))
    with evaluation_mode(model):
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
    # Counters are updated a few times a second; one that has not moved says nothing about the passes.
    energy = meter.result.per(len(times)) if meter.result is not None and meter.result.joules else None
    return Passes(statistics.median(times), energy, batch_size, len(times))
