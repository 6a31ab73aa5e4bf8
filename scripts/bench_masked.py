"""Cost of a masked training step relative to a dense one.

Both networks train in one process, in turns, and the medians of their step times are compared: on a noisy machine only the
ratio is meaningful. The time of a topology update is part of its step, and is printed per update as well.

    python scripts/bench_masked.py                   # MLP 3×1000, batch 128, on the CPU
    python scripts/bench_masked.py --device cuda --batch 1024
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import dst
from dst.models import MLP
from dst.tables import aligned_table


def make_step(method: dst.Method | None, args: argparse.Namespace) -> tuple[Callable[[], None], dst.Sparsifier | None]:
    """Return a training step on fixed random data, and its sparsifier; without a method the step is plain PyTorch."""
    torch.manual_seed(0)
    model = MLP((1, 28, 28), 10, width=args.width, depth=3).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    sparsifier = None if method is None else dst.Sparsifier(model, optimizer, method, total_steps=10 * args.steps)
    images = torch.randn(args.batch, 1, 28, 28, device=args.device)
    labels = torch.randint(0, 10, (args.batch,), device=args.device)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        if sparsifier is not None:
            sparsifier.before_step()
        optimizer.step()

    return step, sparsifier


def timed(step: Callable[[], None], device: str) -> float:
    """Return the time of one step in seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--update-every", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    methods = {
        "dense (no dst)": None,
        "dense": dst.methods.dense(),
        "static": dst.methods.sparse_from_scratch(args.density),
        "set": dst.methods.set_(args.density, update_every=args.update_every),
        "rigl": dst.methods.rigl(args.density, update_every=args.update_every),
    }
    made = {name: make_step(method, args) for name, method in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    updates: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(20):
        for step, _ in made.values():
            step()
    for _ in range(args.steps):
        for name, (step, sparsifier) in made.items():
            before = sparsifier.updates if sparsifier is not None else 0
            seconds = timed(step, args.device)
            updated = sparsifier is not None and sparsifier.updates > before
            (updates if updated else times)[name].append(seconds)
    reference = statistics.median(times["dense (no dst)"])
    print(
        f"MLP 3×{args.width}, batch {args.batch}, {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    rows = [["", "step, ms", "× dense", "update step, ms", "all steps, × dense"]]
    for name in made:
        median = statistics.median(times[name])
        update = statistics.median(updates[name]) if updates[name] else float("nan")
        share = len(updates[name]) / args.steps
        overall = ((1 - share) * median + (share * update if updates[name] else 0)) / reference
        rows.append([name, f"{1e3 * median:.2f}", f"{median / reference:.3f}", f"{1e3 * update:.1f}", f"{overall:.3f}"])
    print(aligned_table(rows, right=range(1, 5)))


if __name__ == "__main__":
    main()
