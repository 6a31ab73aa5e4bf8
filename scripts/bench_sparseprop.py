"""Time sparse layers of dst against SparseProp (Nikdan et al., 2023) and torch: forward and all gradients, by wall clock.

    python scripts/bench_sparseprop.py                            # every shape and density, torch's number of threads
    python scripts/bench_sparseprop.py --only linear --densities 0.1 --seconds 20

Every side is a module that autograd runs, in one process. Sides take turns of several calls, as a training loop calls a
layer, and the first call of a turn is not counted. Times are medians. A convolution of SparseProp runs in both of its modes,
along the rows of images (``width``) and along the batch (``batch``); the ratio is to the faster one. ``own order`` is the
second mode on tensors that already have the batch as their last dimension in memory, which saves its two transposes. Results
are compared with torch's before anything is timed.

SparseProp is an sdist whose setup.py calls pip. To build it for an x86-64 processor with AVX2::

    pip install pybind11 scipy
    pip download --no-binary :all: --no-deps --no-build-isolation sparseprop==0.1.14
    tar xzf sparseprop-0.1.14.tar.gz && cd sparseprop-0.1.14
    sed -i /subprocess.run/d setup.py && python setup.py build_ext --inplace
    export PYTHONPATH=$PWD:$PYTHONPATH
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dst import kernels
from dst.nn import SparseConv2d, SparseLinear

try:
    from sparseprop import modules as prop
    from sparseprop.modules.utils import from_csr_2d, from_sparse_format_conv2d
except ImportError as missing:
    prop, reason = None, missing

# Channels, height and width: 3×3 convolutions with as many outputs, batch 64.
CONVOLUTIONS = [(16, 32), (32, 16), (64, 8), (128, 16)]
# Rows, in, out.
LINEAR = [(4096, 192, 768), (4096, 768, 192), (128, 1000, 1000)]

Run: TypeAlias = Callable[[], tuple[Tensor, ...]]


def step(module: nn.Module, x: Tensor, g: Tensor) -> Run:
    """Return a function that gives the output and the gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    wanted = x, *module.parameters()

    def run() -> tuple[Tensor, ...]:
        y = module(x)
        return y.detach(), *torch.autograd.grad(y, wanted, g)

    return run


def measure(runs: dict[str, Run], seconds: float, calls: int) -> dict[str, float]:
    """Return the median time of each run, in seconds: turns of ``calls`` calls for about ``seconds`` in all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    start, turns = time.perf_counter(), 0
    while turns < 3 or time.perf_counter() - start < seconds:
        for name, run in runs.items():
            for call in range(calls + 1):
                before = time.perf_counter()
                run()
                if call and turns:
                    times[name].append(time.perf_counter() - before)
        turns += 1
    return {name: statistics.median(t) for name, t in times.items()}


def check(name: str, got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Compare output and gradients with torch's.

    Raises:
        SystemExit: A tensor differs by more than rounding.
    """
    for what, a, b in zip(
        ("output", "input's gradient", "weight's gradient", "bias' gradient"), got, wanted, strict=False
    ):
        gap = float((a - b).abs().max() / b.abs().max())
        if not gap < 1e-4:
            raise SystemExit(f"{name}: the {what} differs from torch's by {gap:.1e} of its largest entry")


def batch_last(x: Tensor) -> Tensor:
    """Return ``x`` ``[N, C, H, W]`` with the batch as its last dimension in memory."""
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def drawn(shape: Sequence[int], density: float) -> Tensor:
    """Return a mask with ``density`` of its entries True."""
    mask = torch.zeros(math.prod(shape), dtype=torch.bool)
    mask[torch.randperm(mask.numel())[: round(density * mask.numel())]] = True
    return mask.view(*shape)


def convolution(channels: int, size: int, density: float) -> dict[str, Run]:
    """Return the runs of a 3×3 convolution, whose results agree."""
    dense = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    mask = drawn(dense.weight.shape, density)
    with torch.no_grad():
        dense.weight.mul_(mask)
    indices = mask.view(-1).nonzero().squeeze(1)
    values = dense.weight.detach().view(-1)[indices]
    ours = SparseConv2d(
        channels, channels, indices, values, kernel_size=(3, 3), padding=(1, 1), bias=False
    )  # fmt: skip
    theirs = {
        name: prop.SparseConv2d.from_dense(dense, vectorizing_over_on=rows)
        for name, rows in (("width", True), ("batch", False))
    }
    x, g = torch.randn(64, channels, size, size), torch.randn(64, channels, size, size)
    runs = {"dense": step(dense, x, g), "dst": step(ours, x, g)}
    runs |= {name: step(module, x, g) for name, module in theirs.items()}
    runs["own order"] = step(theirs["batch"], batch_last(x), batch_last(g))
    y, gx, gw = runs["dense"]()
    for name, run in runs.items():
        if name == "dense":
            continue
        *others, gv = run()
        if name == "dst":
            gv = ours.to_dense(gv)
        else:
            gv = from_sparse_format_conv2d(gv, theirs["batch"].W_idx, tuple(dense.weight.shape))
        check(name, (*others, gv), (y, gx, gw * mask))
    return runs


def linear(batch: int, columns: int, rows: int, density: float) -> dict[str, Run]:
    """Return the runs of a linear layer with a bias, whose results agree."""
    dense = nn.Linear(columns, rows)
    mask = drawn(dense.weight.shape, density)
    with torch.no_grad():
        dense.weight.mul_(mask)
    ours, theirs = SparseLinear.from_linear(dense, mask), prop.SparseLinear.from_dense(dense)
    x, g = torch.randn(batch, columns), torch.randn(batch, rows)
    runs = {"dense": step(dense, x, g), "dst": step(ours, x, g), "SparseProp": step(theirs, x, g)}
    y, gx, gw, gb = runs["dense"]()
    back: dict[str, Callable[[Tensor], Tensor]] = {
        "dst": ours.to_dense,
        "SparseProp": lambda gv: from_csr_2d(gv, theirs.W_idx, tuple(dense.weight.shape)),
    }
    for name, to_dense in back.items():
        got_y, got_x, gv, got_b = runs[name]()
        check(name, (got_y, got_x, to_dense(gv), got_b), (y, gx, gw * mask, gb))
    return runs


def line(label: str, density: float, times: dict[str, float]) -> tuple[str, float]:
    """Return a line of the table, and how many times as fast as SparseProp dst is."""
    theirs = {name: t for name, t in times.items() if name not in ("dense", "dst", "own order")}
    best = min(theirs, key=lambda name: theirs[name])
    ratio = theirs[best] / times["dst"]
    text = f"{label:24} {density:<5g}" + "".join(f"  {name} {t * 1e3:7.2f}" for name, t in times.items())
    text += f" ms  x SparseProp ({best}) {ratio:5.2f}"
    if "own order" in times:
        text += f"  (own order {times['own order'] / times['dst']:5.2f})"
    return (
        text + f"  x dense {times['dense'] / times['dst']:5.2f}, SparseProp {times['dense'] / theirs[best]:5.2f}",
        ratio,
    )


def main() -> None:
    """Print the table and the geometric mean of its ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--densities", default="0.1,0.05")
    parser.add_argument("--only", default="", help="a part of the labels, such as linear or '16 channels'")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=6.0, help="for every line")
    parser.add_argument("--calls", type=int, default=5, help="counted calls of a turn")
    options = parser.parse_args()
    if prop is None:
        print(f"skipped: SparseProp is not installed ({reason}). {__doc__[__doc__.index('To build it') :]}")
        return
    if kernels.load() is None:
        raise SystemExit("there are no compiled kernels here; run python -m dst.kernels.build")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{options.threads} threads, {kernels.load().isa}: medians in ms", flush=True)
    layers: list[tuple[str, Callable[..., dict[str, Run]], tuple[Any, ...]]] = [
        (f"3x3 {c} channels, {size}x{size}", convolution, (c, size)) for c, size in CONVOLUTIONS
    ]
    layers += [(f"linear {b} x {i} -> {o}", linear, (b, i, o)) for b, i, o in LINEAR]
    ratios = []
    for label, build, sizes in layers:
        for density in map(float, options.densities.split(",")):
            if options.only in label:
                text, ratio = line(label, density, measure(build(*sizes, density), options.seconds, options.calls))
                ratios.append(ratio)
                print(text, flush=True)
    if ratios:
        print(f"x SparseProp: least {min(ratios):.2f}, geometric mean {statistics.geometric_mean(ratios):.2f}")


if __name__ == "__main__":
    main()
