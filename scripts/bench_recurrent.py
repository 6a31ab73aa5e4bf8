"""Time ``nn.LSTM`` and ``nn.GRU`` with csr weights against dense ones: forward and backward, interleaved, medians.

    python scripts/bench_recurrent.py                            # all shapes and densities
    python scripts/bench_recurrent.py --kinds gru --hidden 1024 --repeats 5

Both modules have the same weights and one layer. The gradients of input, weights and biases are computed. A ratio above 1
means that csr is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

import dst

# Input size, hidden size, steps, batch size.
SHAPES = [
    (128, 256, 32, 16),
    (128, 256, 64, 64),
    (256, 512, 64, 16),
    (256, 512, 64, 32),
    (256, 512, 32, 64),
    (512, 512, 128, 32),
    (512, 1024, 32, 16),
    (512, 1024, 32, 32),
    (256, 1024, 64, 64),
]
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU}


def seconds(module: nn.Module, x: Tensor, gradient: Tensor) -> float:
    """Return the time of one forward and backward pass."""
    module.zero_grad()
    x.grad = None
    start = time.perf_counter()
    module(x)[0].backward(gradient)
    return time.perf_counter() - start


def bench(kind: str, shape: tuple[int, int, int, int], density: float, repeats: int) -> str:
    """Return one line of the table."""
    inputs, hidden, steps, batch = shape
    torch.manual_seed(0)
    method = dst.methods.static(density, sparsify_at=0, allocation=dst.allocation.Uniform(), backend="csr")
    sparse = dst.prepare(nn.Sequential(KINDS[kind](inputs, hidden)), method)
    dense = nn.Sequential(KINDS[kind](inputs, hidden))
    dense.load_state_dict(dst.dense_state_dict(sparse))
    x, gradient = torch.randn(steps, batch, inputs, requires_grad=True), torch.randn(steps, batch, hidden)
    times: dict[str, list[float]] = {"dense": [], "csr": []}
    for _ in range(repeats + 1):
        times["dense"].append(seconds(dense[0], x, gradient))
        times["csr"].append(seconds(sparse[0], x, gradient))
    of_dense, of_csr = (1e3 * statistics.median(t[1:]) for t in times.values())
    line = f"{kind:4s} {inputs:3d} -> {hidden:4d}  {steps:3d} steps  batch {batch:2d}  density {density:<4g}"
    return f"{line}  dense {of_dense:7.1f} ms  csr {of_csr:7.1f} ms  ratio {of_dense / of_csr:5.2f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default="lstm,gru")
    parser.add_argument("--densities", default="0.1,0.05")
    parser.add_argument("--hidden", default="", help="hidden sizes, such as 512,1024; by default all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wanted = [int(size) for size in options.hidden.split(",")] if options.hidden else []
    for kind in options.kinds.split(","):
        for shape in SHAPES:
            if wanted and shape[1] not in wanted:
                continue
            for density in map(float, options.densities.split(",")):
                print(bench(kind, shape, density, options.repeats), flush=True)


if __name__ == "__main__":
    main()
