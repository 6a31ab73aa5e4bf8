"""Time truly sparse layers against dense ones: ratios in one process, interleaved, medians, cold caches.

    python scripts/bench_csr.py                 # every table; about ten minutes
    python scripts/bench_csr.py --quick         # fewer repetitions, narrow networks only
    python scripts/bench_csr.py --only step,inference --threads 1

Before every timed call a buffer larger than the caches is swept: hot caches flatter whatever is small. That evicts the
interpreter too, which a single example cannot hide; the inference table therefore also gives the ratio with cold weights
but warm code (after the sweep, a tiny network of the same modules runs untimed). A ratio is the quotient of two medians;
above 1 the sparse side is faster. With one thread CPU time is taken, which other processes disturb less than wall time.
The peer sparselab is timed where it is installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from dst import kernels
from dst.kernels import TorchKernels
from dst.nn.sparse_linear import FeatureMajorLinear, SparseLinear, remap

_SWEEP = torch.zeros(24 << 20)
STEP_GOALS = {0.2: 2.0, 0.1: 3.5, 0.05: 5.5, 0.01: 8.0}
WIDE_GOALS = {0.05: 9.0, 0.01: 25.0}
FALLBACK_GOALS = {0.1: 1.8, 0.05: 3.0}


def dense_mlp(widths: Sequence[int]) -> nn.Sequential:
    """Return a ReLU network of ``nn.Linear`` layers with these widths."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [nn.Linear(a, b)] + ([nn.ReLU()] if i + 2 < len(widths) else [])
    return nn.Sequential(*layers)


def sparse_mlp(widths: Sequence[int], density: float, engine: kernels.Engine | None = None) -> nn.Sequential:
    """Return the same network with sparse hidden layers, ReLU fused, and a dense feature-major head."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths[:-1]):
        layer = SparseLinear.random(a, b, round(density * a * b), relu=True)
        if engine is not None:
            use_engine(layer, engine)
        layers.append(layer)
    return nn.Sequential(*layers, FeatureMajorLinear(widths[-2], widths[-1]))


def use_engine(layer: SparseLinear, engine: kernels.Engine) -> None:
    """Let ``layer`` compute with ``engine``, whatever this machine would choose."""
    flat = layer.pattern.flat()
    layer._engine = engine
    layer._pattern = engine.pattern(flat, layer.out_features, layer.in_features)
    layer.refresh()


def peer_mlp(widths: Sequence[int], density: float) -> nn.Sequential | None:
    """Return the network with sparselab's layers, or None where it is not installed."""
    if find_spec("sparselab") is None:
        return None
    import sparselab

    layers: list[nn.Module] = []
    for a, b in pairwise(widths[:-1]):
        layers += [sparselab.SparseLinear(a, b, sparsity=1 - density), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD with momentum, or AdamW."""
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-3)
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def training_step(model: nn.Module, optimizer: str, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Return a function that makes one whole training step of ``model``."""
    chosen = make_optimizer(optimizer, model)

    def step() -> None:
        chosen.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        chosen.step()

    return step


def measure(
    functions: dict[str, Callable[[], object]],
    repeats: int,
    warmup: int = 3,
    before: dict[str, Callable[[], object]] | None = None,
) -> dict[str, float]:
    """Return each function's median time in seconds: in turns, after a sweep of the caches before every call.

    Args:
        functions: what to time, by name.
        repeats: timed calls of each.
        warmup: untimed calls of each.
        before: by name, what to call between the sweep and the timed call.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(warmup + repeats):
        for name, function in functions.items():
            _SWEEP.add_(1)
            if before is not None:
                before[name]()
            start = clock()
            function()
            if i >= warmup:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def report(rows: list[dict[str, object]], **row: object) -> None:
    """Print one line and keep it."""
    rows.append(row)
    print("  ".join(f"{key} {value:.2f}" if isinstance(value, float) and key != "density" else f"{key} {value}"
                    for key, value in row.items()), flush=True)  # fmt: skip


def bench_steps(rows: list[dict[str, object]], quick: bool) -> None:
    """Time whole training steps: 784-1000-1000-1000-10 and the same with hidden width 4096."""
    x, y = torch.randn(128, 784), torch.randint(10, (128,))
    for hidden, goals in ((1000, STEP_GOALS), (4096, WIDE_GOALS)):
        if quick and hidden > 1000:
            continue
        widths = [784, hidden, hidden, hidden, 10]
        repeats = 9 if quick or hidden > 1000 else 41
        for optimizer in ("sgd", "adamw"):
            for density, goal in goals.items():
                models = {"dense": dense_mlp(widths), "sparse": sparse_mlp(widths, density)}
                if hidden == 1000:
                    models["fallback"] = sparse_mlp(widths, density, TorchKernels())
                    peer = peer_mlp(widths, density)
                    if peer is not None:
                        models["sparselab"] = peer
                t = measure({k: training_step(m, optimizer, x, y) for k, m in models.items()}, repeats)
                others = {f"vs_{k}": t[k] / t["sparse"] for k in t if k not in ("dense", "sparse", "fallback")}
                if "fallback" in t:
                    others["fallback_ratio"] = t["dense"] / t["fallback"]
                    if density in FALLBACK_GOALS:
                        others["fallback_goal"] = FALLBACK_GOALS[density]
                report(rows, table="step", hidden=hidden, optimizer=optimizer, density=density,
                       dense_ms=t["dense"] * 1e3, sparse_ms=t["sparse"] * 1e3, ratio=t["dense"] / t["sparse"], goal=goal,
                       **others)  # fmt: skip


def bench_inference(rows: list[dict[str, object]], quick: bool) -> None:
    """Time inference on one thread, batch 1 and 64."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    widths = [784, 1000, 1000, 1000, 10]
    try:
        for batch, goals in ((1, {0.1: 4.0, 0.05: 5.0}), (64, {0.1: 4.5, 0.05: None})):
            x = torch.randn(batch, 784)
            for density, goal in goals.items():
                models = {"dense": dense_mlp(widths).eval(), "sparse": sparse_mlp(widths, density).eval()}
                tiny = {
                    "dense": dense_mlp([784, 4, 4, 4, 10]).eval(),
                    "sparse": sparse_mlp([784, 4, 4, 4, 10], 0.5).eval(),
                }
                with torch.inference_mode():
                    calls = {k: partial(m, x) for k, m in models.items()}
                    cold = measure(calls, 31 if quick else 201)
                    t = measure(calls, 31 if quick else 201, before={k: partial(m, x) for k, m in tiny.items()})
                # The headline ratio is the fully cold one, as in every other table; warm code is shown beside it.
                report(rows, table="inference", batch=batch, density=density, dense_us=cold["dense"] * 1e6,
                       sparse_us=cold["sparse"] * 1e6, ratio=cold["dense"] / cold["sparse"], goal=goal,
                       ratio_warm_code=t["dense"] / t["sparse"])  # fmt: skip
    finally:
        torch.set_num_threads(before)


def rewire(model: nn.Module, optimizer: torch.optim.Optimizer, fraction: float) -> None:
    """Make one RigL update of every sparse layer, carrying the optimizer's state along."""
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            k = int(fraction * layer.nnz)
            kept = layer.kept_indices(layer.drop_candidates(k))
            source = layer.rewire(kept, layer.grow_candidates(k, exclude=kept))
            layer.collect_dense_gradient(False)
            state = optimizer.state.get(layer.values, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == (source.numel(),):
                    state[key] = remap(value, source)


def bench_updates(rows: list[dict[str, object]], quick: bool) -> None:
    """Time RigL updates (fraction 0.3, every 100 steps) as a share of training."""
    x, y = torch.randn(128, 784), torch.randint(10, (128,))
    for density in STEP_GOALS:
        model = sparse_mlp([784, 1000, 1000, 1000, 10], density)
        optimizer = make_optimizer("sgd", model)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        def update(
            model: nn.Module = model,
            optimizer: torch.optim.Optimizer = optimizer,
            step: Callable[[], None] = step,
        ) -> None:
            for layer in model.modules():
                if isinstance(layer, SparseLinear):
                    layer.collect_dense_gradient(True)
            step()
            rewire(model, optimizer, 0.3)

        t = measure({"step": step, "update": update}, 7 if quick else 41)
        extra = t["update"] - t["step"]
        report(rows, table="update", density=density, step_ms=t["step"] * 1e3, update_ms=extra * 1e3,
               percent_of_training=100 * extra / (100 * t["step"] + extra), goal="<= 6")  # fmt: skip


def bench_state(rows: list[dict[str, object]], quick: bool) -> None:
    """Count bytes of state a non-zero: values, both orders, indices, gradient, momentum."""
    for width, density in ((1000, 0.1), (4096, 0.05), (70_000, 0.0002)):
        layer = SparseLinear.random(width, width, round(width * width * density))
        total = layer.state_bytes() + 2 * layer.values.numel() * layer.values.element_size()
        report(rows, table="state", width=width, density=density, bytes_per_nonzero=total / layer.nnz, goal="<= 28")


TABLES = {"state": bench_state, "inference": bench_inference, "update": bench_updates, "step": bench_steps}


def main() -> None:
    """Run the tables asked for and write their rows as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, narrow networks only")
    parser.add_argument("--only", default=",".join(TABLES), help=f"comma-separated tables: {', '.join(TABLES)}")
    parser.add_argument("--threads", type=int, help="threads for torch and the kernels")
    parser.add_argument("--json", help="write the rows here")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta.*")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    engine = kernels.engine()
    isa = getattr(engine, "isa", "")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, engine {engine.name} {isa}")
    rows: list[dict[str, object]] = []
    for name in arguments.only.split(","):
        TABLES[name](rows, arguments.quick)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
