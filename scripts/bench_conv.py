"""Time the direct sparse convolution against torch's dense one: ratios in one process, interleaved, medians.

    python scripts/bench_conv.py                # every table, with torch's number of threads
    python scripts/bench_conv.py --threads 1 --batch 128 --repetitions 25
    python scripts/bench_conv.py --least        # minima: on a busy machine two threads rarely run undisturbed

A ratio is the quotient of two medians of wall time (with one thread: CPU time, which other processes disturb less); above
1 the sparse side is faster. Dense backward passes give the gradients of input and weight, sparse ones those of input and
non-zeros. GF/s count two operations for each non-zero and position (four in the backward pass).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from dst import kernels
from dst.kernels.geometry import ConvShape

DENSITIES = (0.2, 0.1, 0.05)
# Input channels, size, output channels, kernel, stride.
LAYERS = {
    "ResNet-like": [(16, 32, 16, 3, 1), (32, 16, 32, 3, 1), (64, 8, 64, 3, 1), (128, 16, 128, 3, 1)],
    "wrn_22_2": [(32, 32, 32, 3, 1), (64, 16, 64, 3, 1), (128, 8, 128, 3, 1)],
    "stride 2": [(32, 32, 64, 3, 2), (64, 16, 128, 3, 2)],
    "1x1": [(32, 32, 64, 1, 2), (64, 16, 128, 1, 2), (64, 16, 128, 1, 1)],
}


def timed(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """Return the seconds that one call takes."""
    start = clock()
    run()
    return clock() - start


def layer(
    batch: int,
    sizes: tuple[int, ...],
    repetitions: int,
    clock: Callable[[], float],
    typical: Callable[[list[float]], float],
) -> None:
    """Time one layer at every density and print a line for each."""
    engine = kernels.load()
    if engine is None:
        raise SystemExit("there are no compiled kernels here")
    channels, size, outputs, kernel, stride = sizes
    padding = kernel // 2
    shape = ConvShape((batch, channels, size, size), outputs, (kernel, kernel), (stride, stride), (padding, padding))
    x = torch.randn(batch, channels, size, size, requires_grad=True)
    weight = torch.randn(outputs, channels, kernel, kernel, requires_grad=True)
    inputs, g = x.detach(), torch.randn(shape.output)
    runs = {}
    for density in DENSITIES:
        flat = torch.randperm(weight.numel())[: round(density * weight.numel())].sort().values
        pattern = engine.pattern(flat, outputs, channels * kernel * kernel)
        values = torch.randn(pattern.nnz)
        row_values = torch.empty_like(values)
        engine.refresh(pattern, values, row_values)
        runs[density] = (
            pattern.nnz,
            lambda p=pattern, v=row_values: engine.conv_forward(p, shape, v, inputs, None),
            lambda p=pattern, v=values: engine.conv_backward(p, shape, v, inputs, g, input=True, bias=False),
        )
    times: dict[object, tuple[list[float], list[float]]] = {key: ([], []) for key in ("dense", *runs)}
    for _ in range(repetitions + 2):
        for density, (_, forward, backward) in runs.items():
            times["dense"][0].append(timed(lambda: functional.conv2d(x, weight, None, stride, padding), clock))
            times[density][0].append(timed(forward, clock))
            y = functional.conv2d(x, weight, None, stride, padding)
            times["dense"][1].append(timed(lambda y=y: torch.autograd.grad(y, (x, weight), g), clock))
            times[density][1].append(timed(backward, clock))
    medians = {key: [typical(part[2:]) for part in parts] for key, parts in times.items()}
    f, b = medians["dense"]
    positions = batch * shape.output[2] * shape.output[3]
    for density, (nnz, _, _) in runs.items():
        sf, sb = medians[density]
        print(
            f"{channels:>4}x{size:<3}-> {outputs:<4} k{kernel} s{stride} {density:>5}  "
            f"dense {f * 1e3:7.2f} + {b * 1e3:7.2f} ms  sparse {sf * 1e3:7.2f} + {sb * 1e3:7.2f} ms  "
            f"x{f / sf:5.2f} x{b / sb:5.2f}  both x{(f + b) / (sf + sb):5.2f}  "
            f"{2e-9 * nnz * positions / sf:5.1f} {4e-9 * nnz * positions / sb:5.1f} GF/s",
            flush=True,
        )


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--least", action="store_true", help="minima in place of medians")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    for name, layers in LAYERS.items():
        print(f"{name}, batch {options.batch}, {options.threads} threads: forward + backward")
        for sizes in layers:
            layer(options.batch, sizes, options.repetitions, clock, min if options.least else statistics.median)


if __name__ == "__main__":
    main()
