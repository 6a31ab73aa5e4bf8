"""Run folders for reports, written without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dst.report.summary import Density, Flops, Quality, Summary, Topology

HOSTILE = '<script>alert("x")</script> & "quoted" \'name\''


def make_run(
    folder: Path, names: list[str], *, finished: bool = True, updates: int = 5, executed: float | None = None
) -> Path:
    """Write a run's folder with layers of 8 outputs and 16 inputs."""
    folder.mkdir(parents=True, exist_ok=True)
    count = len(names)
    rows: list[dict[str, Any]] = [
        {"event": "layers", "names": names, "shapes": [[8, 16]] * count, "weights": [128] * count}
    ]
    for i in range(updates + 1):
        row = {
            "event": "mask", "step": 100 * i, "epoch": i, "density": 0.25, "updates": i, "churn": 0.3 / (i + 1),
            "exploration_rate": 0.25 + 0.05 * i, "drop_fraction": 0.3, "loss": 1 / (i + 1), "active": [32] * count,
            "dead_inputs": [i] * count, "dead_outputs": [j % 3 for j in range(count)],
        }  # fmt: skip
        rows.append(row)
        if i:
            loss = {"event": "loss", "step": 100 * i + 10, "update": 100 * i, "before": 1.0, "after": 1.5, "spike": 0.5}
            rows.append(loss)
    if finished:
        histogram = {"first": 2, "width": 1, "counts": [1, 3, 2, 2]}
        picture = {"kind": "pixels", "counts": [[x * y for x in range(4)] for y in range(4)]}
        rows.append({**row, "event": "end", "in_degrees": [histogram] * count, "input": picture})
        layers = [{"name": n, "shape": [8, 16], "weights": 128, "nonzero": 32, "density": 0.25} for n in names]
        summary = Summary(
            "rigl", 7, 500, 3.5, Density(0.25, 0.25, layers), Quality(0.9, 0.3), Flops(0.25, 0.28, executed),
            Topology(updates, 0.5),
        )  # fmt: skip
        summary.write(folder)
    (folder / "topology.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["step,train/accuracy,train/loss,val/accuracy,val/loss,test/accuracy,test/loss"]
    lines += [f"{100 * i},{0.5 + 0.08 * i},{1 / (i + 1)},{0.5 + 0.07 * i},{1.2 / (i + 1)},," for i in range(1, 6)]
    lines += ["500,,,,,0.9,0.3"] * finished
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (folder / ".hydra").mkdir(exist_ok=True)
    (folder / ".hydra" / "config.yaml").write_text("density: 0.25\nbackend: masked\nseed: 7\n")
    return folder
