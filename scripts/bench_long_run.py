"""Time steps and updates over a long training. Their cost must not grow with the number of updates.

    python scripts/bench_long_run.py --updates 10000

Prints the median time of a step in milliseconds and the peak resident memory for each tenth of the training, and the ratio of the last
tenth to the first.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from itertools import pairwise

import torch
from torch import nn

import dst
from dst.schedules import Constant


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=10_000, help="topology updates, one per step")
    parser.add_argument("--width", type=int, default=64, help="inputs and outputs of each of two layers")
    parser.add_argument("--density", type=float, default=0.1)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(arguments.width, arguments.width) for _ in range(2)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    method = dst.methods.rigl(arguments.density, update_every=1, stop=1.0, fraction=Constant(0.3), replace_step=False)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=arguments.updates)
    batch = torch.randn(16, arguments.width)
    medians = []
    bounds = [arguments.updates * i // 10 for i in range(11)]
    for first, last in pairwise(bounds):
        times = []
        for _ in range(first, last):
            began = time.perf_counter()
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            sparsifier.before_step()
            optimizer.step()
            times.append(time.perf_counter() - began)
        medians.append(1e3 * statistics.median(times))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(f"updates {first:>7} to {last:>7}: {medians[-1]:.3f} ms per step, peak {memory:.0f} MiB", flush=True)
    assert sparsifier.updates == arguments.updates
    print(f"last tenth / first tenth: {medians[-1] / medians[0]:.3f}")


if __name__ == "__main__":
    main()
