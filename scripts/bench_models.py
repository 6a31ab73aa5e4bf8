"""Whole training steps of the shipped models: masked, csr and auto against dense, by wall clock.

All variants of a model train in one process at torch's default number of threads; the table has ratios of median step times.
Variants take turns of ``--turn`` steps in random order. The first step of a turn is not counted: it finds the caches full of
another variant's weights, which training never does. ``--turn 1`` counts such steps and no others. SGD with momentum, batch
64 (MLP 128, GPT 16 sequences of 128 tokens), no topology update within the measured steps. ``--updates`` prints instead
which share of training RigL's updates take, at one every 100 steps.

    python scripts/bench_models.py
    python scripts/bench_models.py --models vit_tiny gpt --densities 0.1 --backends csr auto
    python scripts/bench_models.py --models lenet_300_100 mlp_100 gpt_32 --densities 0.1 0.2 0.5 --backends masked auto
    python scripts/bench_models.py --backends csr --turn 1
    python scripts/bench_models.py --backends csr --updates
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import dst
from dst.models import GPT, MLP, WRN22_2, ConvNet, GRUCharModel, GRUClassifier, LeNet300100, ResNet20, ViTTiny
from dst.tables import aligned_table

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20": (lambda: ResNet20((3, 32, 32), 10), (64, 3, 32, 32)),
    "wrn_22_2": (lambda: WRN22_2((3, 32, 32), 10), (64, 3, 32, 32)),
    "vit_tiny": (lambda: ViTTiny((3, 32, 32), 10), (64, 3, 32, 32)),
    "gpt": (lambda: GPT(65, 128), (16, 128)),
    "mlp": (lambda: MLP((1, 28, 28), 10, width=1000, depth=3), (128, 1, 28, 28)),
    "mlp_100": (lambda: MLP((1, 28, 28), 10, width=100, depth=3), (128, 1, 28, 28)),
    "lenet_300_100": (lambda: LeNet300100((1, 28, 28), 10), (128, 1, 28, 28)),
    "lenet_narrow": (lambda: LeNet300100((1, 28, 28), 10, width_factor=0.25), (128, 1, 28, 28)),
    "convnet": (lambda: ConvNet((3, 32, 32), 10), (64, 3, 32, 32)),
    "convnet_8": (lambda: ConvNet((3, 32, 32), 10, width=8), (64, 3, 32, 32)),
    "resnet20_narrow": (lambda: ResNet20((3, 32, 32), 10, width_factor=0.5), (64, 3, 32, 32)),
    "wrn_22_2_narrow": (lambda: WRN22_2((3, 32, 32), 10, width_factor=0.25), (64, 3, 32, 32)),
    "vit_48": (lambda: ViTTiny((3, 32, 32), 10, width=48, depth=4), (64, 3, 32, 32)),
    "gpt_32": (lambda: GPT(65, 64, width=32, depth=2), (16, 64)),
    "gpt_moe": (lambda: GPT(65, 128, experts=4), (16, 128)),
    "gru": (lambda: GRUClassifier((1, 28, 28), 10), (128, 1, 28, 28)),
    "gru_char": (lambda: GRUCharModel(65, 128), (16, 128)),
}
DEFAULT = ["resnet20", "wrn_22_2", "vit_tiny", "gpt", "mlp"]


def make_step(name: str, method: dst.Method | None) -> tuple[Callable[[], None], dst.Sparsifier | None]:
    """Return a training step on fixed random data, and its sparsifier; without a method the step is plain PyTorch."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build()
    inputs = torch.randint(0, 65, shape) if len(shape) == 2 else torch.randn(shape)
    targets = torch.randint(0, 65, shape) if len(shape) == 2 else torch.randint(0, 10, shape[:1])
    if method is not None:
        model = dst.prepare(model, method, example=inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    sparsifier = None if method is None else dst.Sparsifier(model, optimizer, method, total_steps=100_000)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        if sparsifier is not None:
            sparsifier.before_step()
        optimizer.step()

    return step, sparsifier


def timed(step: Callable[[], None]) -> float:
    """Return the time of one step in seconds."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def take_turn(step: Callable[[], None], steps: int) -> list[float]:
    """Return the step times of a turn, without its first step if it has several."""
    times = [timed(step) for _ in range(steps)]
    return times[1:] or times


def bench(name: str, backends: list[str], densities: list[float], seconds: float, turn: int) -> list[tuple[str, ...]]:
    """Time one model; returns the rows of the table."""
    made: dict[tuple[str, float], tuple[Callable[[], None], dst.Sparsifier | None]] = {
        ("dense", 1.0): make_step(name, None)
    }
    for density in densities:
        for backend in backends:
            method = dst.methods.rigl(density, update_every=100, backend=backend)
            made[backend, density] = make_step(name, method)
    times: dict[tuple[str, float], list[float]] = {key: [] for key in made}
    turns: dict[tuple[str, float], list[float]] = {key: [] for key in made}
    for _ in range(3):
        for step, _ in made.values():
            step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(turns["dense", 1.0]) < 5:
        for key in random.sample(list(made), len(made)):
            taken = take_turn(made[key][0], turn)
            times[key] += taken
            turns[key].append(statistics.median(taken))
    dense = statistics.median(times["dense", 1.0])
    rows = []
    for key, (_, sparsifier) in made.items():
        median = statistics.median(times[key])
        ratios = sorted(a / b for a, b in zip(turns["dense", 1.0], turns[key], strict=True))
        spread = f"{ratios[len(ratios) // 10]:.2f}-{ratios[-1 - len(ratios) // 10]:.2f}"
        csr = 0 if sparsifier is None else list(sparsifier.backends.values()).count("csr")
        layers = 0 if sparsifier is None else len(sparsifier.layers)
        rows.append(
            (
                name,
                key[0],
                f"{key[1]:g}",
                f"{csr} of {layers}",
                f"{1e3 * median:.1f}",
                f"{dense / median:.2f}",
                spread,
            )
        )
    return rows


def share_of_updates(name: str, backend: str, density: float, updates: int = 5) -> tuple[str, ...]:
    """Time steps with and without an update; returns a row of the table."""
    step, sparsifier = make_step(name, dst.methods.rigl(density, update_every=5, stop=1.0, backend=backend))
    assert sparsifier is not None
    ordinary, updating = [], []
    while sparsifier.updates <= updates:
        before = sparsifier.updates
        taken = timed(step)
        if sparsifier.step > 5:
            (updating if sparsifier.updates > before else ordinary).append(taken)
    plain, more = statistics.median(ordinary), statistics.median(updating)
    share = max(0.0, more - plain) / (100 * plain + max(0.0, more - plain))
    return name, backend, f"{density:g}", f"{1e3 * plain:.1f}", f"{1e3 * more:.1f}", f"{100 * share:.1f}%"


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=DEFAULT, choices=list(MODELS))
    parser.add_argument("--backends", nargs="+", default=["masked", "csr", "auto"])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.1, 0.05])
    parser.add_argument("--seconds", type=float, default=60, help="of measuring for each model")
    parser.add_argument("--turn", type=int, default=10, help="steps of a variant before the next one's turn")
    parser.add_argument("--updates", action="store_true", help="the share of updates instead")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if args.updates:
        header = ("model", "backend", "density", "step (ms)", "with update (ms)", "share of updates")
        rows = [share_of_updates(*of) for of in itertools.product(args.models, args.backends, args.densities)]
        print(aligned_table([header, *rows], right={2, 3, 4, 5}))
        return
    table = [("model", "backend", "density", "csr layers", "step (ms)", "× dense", "10-90%")]
    for name in args.models:
        rows = bench(name, args.backends, args.densities, args.seconds, args.turn)
        print(aligned_table([table[0], *rows], right={2, 3, 4, 5, 6}), flush=True)


if __name__ == "__main__":
    main()
