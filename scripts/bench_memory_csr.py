"""Train a 65,536 x 65,536 layer at density 0.001 with RigL growth and report the peak resident memory.

    python scripts/bench_memory_csr.py [--width 65536] [--density 0.001] [--limit-gb 1.5]

Dense weights, gradient and momentum of this layer would need 51 GB. Exits 1 if the peak exceeds the limit.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch
from torch import nn

import dst
from dst.schedules import Constant


def peak_gb() -> float:
    """Return the peak resident memory of this process in gigabytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6 / 1.024)


def main() -> int:
    """Train six steps, two of them with a RigL update."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=65_536)
    parser.add_argument("--density", type=float, default=0.001)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--limit-gb", type=float, default=1.5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch imported: {peak_gb():.2f} GB")
    width = arguments.width
    method = dst.methods.rigl(
        arguments.density, update_every=3, start=2, fraction=Constant(0.3), stop=1.0, backend="csr"
    )
    with torch.device("meta"):
        dense = nn.Linear(width, width)
    layer = dst.prepare(dense, method)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    sparsifier = dst.Sparsifier(layer, optimizer, method, total_steps=100)
    x, target = torch.randn(arguments.batch, width), torch.randn(arguments.batch, width)
    print(f"layer built, {sparsifier.active} non-zeros: {peak_gb():.2f} GB")
    for step in range(6):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        updates = sparsifier.updates
        sparsifier.before_step()
        optimizer.step()
        changed = f", {sparsifier.churn:.0%} new connections" if sparsifier.updates > updates else ""
        print(f"step {step}: loss {loss.item():.4f}, {time.perf_counter() - start:.2f} s{changed}, {peak_gb():.2f} GB")
    peak = peak_gb()
    print(f"peak resident memory {peak:.2f} GB, limit {arguments.limit_gb} GB")
    return int(peak > arguments.limit_gb)


if __name__ == "__main__":
    raise SystemExit(main())
