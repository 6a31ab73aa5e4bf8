"""Time and energy of forward passes on this machine."""

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
    return Passes(statistics.median(times), meter.result.per(len(times)), batch_size, len(times))
