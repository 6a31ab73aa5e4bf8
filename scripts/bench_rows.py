"""Time the row-major kernels against a dense layer: forward and backward with all gradients, interleaved, medians.

    python scripts/bench_rows.py                                # every shape and density
    python scripts/bench_rows.py --densities 0.1 --only 4096x192x768 --parts

A ratio is the quotient of two medians, ``best`` that of two minima: on a machine with other work the second says more. Above
1 the sparse side is faster. With one thread CPU time is taken, which other processes disturb less than wall time. ``GF/s`` counts two operations for every
non-zero, example and pass (output, input gradient, values' gradient). ``old`` is the same quotient for the feature-major
kernels, given row-major tensors. ``--parts`` times forward and backward apart. Both sides start from warm caches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from dst import kernels

SHAPES = [
    (4096, 192, 768),
    (4096, 768, 192),
    (16384, 256, 1024),
    (4096, 1024, 4096),
    (4160, 192, 768),
    (4160, 768, 192),
    (2048, 256, 1024),
]


def measure(functions: dict[str, Callable[[], object]], seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """Return each function's median and least time: called in turns for about ``seconds`` in all, after two warm-ups."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in functions}
    start, turns = time.perf_counter(), 0
    while turns < 5 or time.perf_counter() - start < seconds:
        for name, function in functions.items():
            before = clock()
            function()
            if turns > 1:
                times[name].append(clock() - before)
        turns += 1
    return {name: statistics.median(t) for name, t in times.items()}, {name: min(t) for name, t in times.items()}


def bench(batch: int, columns: int, rows: int, density: float, relu: bool, seconds: float, parts: bool) -> str:
    """Return one line of the table."""
    compiled = kernels.load()
    assert compiled is not None, "no compiled kernels here"
    nnz = round(density * rows * columns)
    flat = torch.randperm(rows * columns)[:nnz].sort().values
    pattern = compiled.pattern(flat, rows, columns)
    values, row_values = torch.randn(nnz), torch.empty(nnz)
    x, g, bias = torch.randn(batch, columns), torch.randn(batch, rows), torch.randn(rows)
    weight = torch.randn(rows, columns)
    xd, wd, bd = (t.clone().requires_grad_() for t in (x, weight, bias))
    kept: dict[str, torch.Tensor] = {}

    def dense_forward() -> None:
        y = functional.linear(xd, wd, bd)
        kept["y"] = y.relu() if relu else y

    def dense_backward() -> None:
        torch.autograd.grad(kept["y"], (xd, wd, bd), g)

    def rows_forward() -> None:
        compiled.refresh(pattern, values, row_values)
        kept["rows"] = compiled.rows_forward(pattern, row_values, x, bias, relu)

    def rows_backward() -> None:
        compiled.rows_backward(pattern, values, x, g, kept["rows"] if relu else None, input=True, bias=True)

    def old_forward() -> None:
        compiled.refresh(pattern, values, row_values)
        kept["xt"] = compiled.feature_major(x)
        kept["old"] = compiled.forward(pattern, row_values, kept["xt"], bias, relu)

    def old_backward() -> None:
        compiled.backward(pattern, values, kept["xt"], g, kept["old"] if relu else None, input=True, bias=True)

    both = {"rows": (rows_forward, rows_backward), "dense": (dense_forward, dense_backward)}
    if not parts:
        both["old"] = (old_forward, old_backward)
    timed = {
        f"{name} {part}": function
        for name, pair in both.items()
        for part, function in zip(("forward", "backward"), pair, strict=True)
    }
    t, least = measure(timed, seconds)
    total, best = ({name: q[f"{name} forward"] + q[f"{name} backward"] for name in both} for q in (t, least))
    line = f"{batch:5d} x {columns:4d} -> {rows:4d}  density {density:<4g}"
    line += f"  rows {total['rows'] * 1e3:7.2f} ms  dense {total['dense'] * 1e3:7.2f} ms  ratio {total['dense'] / total['rows']:5.2f}"
    line += f"  best {best['dense'] / best['rows']:5.2f}"
    line += f"  {6e-9 * nnz * batch / total['rows']:5.1f} GF/s"
    if parts:
        for part, passes in (("forward", 2e-9), ("backward", 4e-9)):
            rows_time, dense_time = t[f"rows {part}"], t[f"dense {part}"]
            line += f"  {part} {dense_time / rows_time:5.2f} ({passes * nnz * batch / rows_time:5.1f} GF/s,"
            line += f" dense {passes * rows * columns * batch / dense_time:5.1f})"
    else:
        line += f"  old {total['dense'] / total['old']:5.2f}, best {best['dense'] / best['old']:5.2f}"
    return line


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--densities", default="0.2,0.1,0.05")
    parser.add_argument("--only", default="", help="shapes as batch x in x out, such as 4096x192x768,2048x256x1024")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="for every line")
    parser.add_argument("--relu", action="store_true")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--isa", default="")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    compiled = kernels.load()
    if options.isa and compiled is not None:
        compiled.isa = options.isa
    print(f"{'none' if compiled is None else compiled.isa}, {options.threads} threads", flush=True)
    wanted = options.only.split(",") if options.only else []
    for shape in SHAPES:
        if wanted and "x".join(map(str, shape)) not in wanted:
            continue
        for density in map(float, options.densities.split(",")):
            print(bench(*shape, density, options.relu, options.seconds, options.parts), flush=True)


if __name__ == "__main__":
    main()
