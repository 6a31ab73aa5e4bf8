"""What a report shows, read from the text files in a run's folder. What a run has not recorded is empty."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dst.errors import DataError
from dst.report.summary import SUMMARY_FILE, Summary
from dst.report.topology_file import TOPOLOGY_FILE, read_rows

METRICS_FILE = "metrics.csv"

Points = list[tuple[float, float]]
"""Pairs (optimizer step, value), ordered by step."""


@dataclass(frozen=True)
class Layers:
    """The sparse layers and their numbers over time. Every list has one entry for each layer.

    Attributes:
        names: Labels.
        shapes: Shapes of the weights.
        weights: Number of weights.
        density: Density over time, in [0, 1].
        dead_inputs: Number of dead inputs over time.
        dead_outputs: Number of dead outputs over time.
        effective: Density over time of the connections on a path from input to output. Empty unless the run was set to
            record it.
    """

    names: list[str]
    shapes: list[list[int]]
    weights: list[int]
    density: list[Points]
    dead_inputs: list[Points]
    dead_outputs: list[Points]
    effective: list[Points]


@dataclass(frozen=True)
class RunData:
    """What a run has recorded so far.

    Attributes:
        folder: The run's folder.
        summary: The summary; None if the run has not ended.
        metrics: Column of ``metrics.csv`` to its points.
        topology: ``churn``, ``exploration_rate``, ``drop_fraction`` and ``loss_spike`` to their points.
        layers: See `Layers`. The lists are empty if nothing was recorded.
        in_degrees: Histogram of each layer at the end of training, see `dst.metrics.recorded.degree_histogram`. Empty
            before.
        picture: Connections of the first layer by position, see `dst.metrics.recorded.input_picture`. None if unknown.
        config: The run's settings as YAML. Empty if the folder has none.
        backend: The backend; "masked" if the settings name none.
        levels: Steps at which the second and later fits begin. Empty for a run with one fit.
    """

    folder: Path
    summary: Summary | None
    metrics: dict[str, Points]
    topology: dict[str, Points]
    layers: Layers
    in_degrees: list[dict[str, Any]]
    picture: dict[str, Any] | None
    config: str
    backend: str
    levels: list[float]


def gather(run: str | os.PathLike[str]) -> RunData:
    """Read a run's folder.

    The steps of a run with several fits (lottery tickets) are counted through: each fit begins where the last one ended.

    Args:
        run: The folder.

    Returns:
        The recorded data.

    Raises:
        DataError: The folder holds no run, or a file in it is damaged.
    """
    folder = Path(run)
    summary_file, metrics_file = folder / SUMMARY_FILE, folder / METRICS_FILE
    if not any(path.is_file() for path in (summary_file, metrics_file, folder / TOPOLOGY_FILE)):
        several = folder.is_dir() and any(folder.rglob(SUMMARY_FILE))
        advice = f"it holds several: name one, or use dst compare {folder}" if several else "name a run's folder"
        raise DataError(f"there is no run in {folder}; {advice}")
    summary = Summary.read(folder) if summary_file.is_file() else None
    table = list(_metric_rows(metrics_file)) if metrics_file.is_file() else []
    rows = read_rows(folder / TOPOLOGY_FILE)
    config, backend = _config(folder / ".hydra" / "config.yaml")
    try:
        offsets = _offsets([*table, *rows])
        return RunData(
            folder=folder,
            summary=summary,
            metrics=_metrics(table, offsets),
            topology=_topology(rows, offsets),
            layers=_layers(rows, offsets),
            in_degrees=next((row["in_degrees"] for row in reversed(rows) if row["event"] == "end"), []),
            picture=next((row["input"] for row in reversed(rows) if row["event"] == "end"), None),
            config=config,
            backend=backend,
            levels=[offset for offset in offsets.values() if offset > 0],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{folder / TOPOLOGY_FILE} is no recording of this version: {type(error).__name__} {error}"
        ) from error


def _metric_rows(path: Path) -> Iterator[dict[str, float]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                yield {name: float(value) for name, value in row.items() if name and value}
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise DataError(f"{path} is not a table of metrics: {error}") from error


def _config(path: Path) -> tuple[str, str]:
    if not path.is_file():
        return "", "masked"
    try:
        text = path.read_text(encoding="utf-8")
        backend = OmegaConf.select(OmegaConf.create(text), "backend", default="masked")
    except Exception as error:  # YAML and OmegaConf raise errors of several kinds
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    return text, str(backend)


def _offsets(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Level to the number of steps before it. A run with one fit has level 0 alone."""
    last: dict[int, float] = {}
    for row in rows:
        level = int(row.get("level", 0))
        last[level] = max(last.get(level, 0.0), float(row.get("step", 0)))
    offsets, total = {}, 0.0
    for level in sorted(last):
        offsets[level] = total
        total += last[level]
    return offsets


def _at(row: Mapping[str, Any], offsets: Mapping[int, float]) -> float:
    return offsets[int(row.get("level", 0))] + float(row["step"])


def _metrics(rows: Sequence[Mapping[str, float]], offsets: Mapping[int, float]) -> dict[str, Points]:
    found: dict[str, Points] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "epoch", "level") and "step" in row and math.isfinite(value):
                found.setdefault(name, []).append((_at(row, offsets), value))
    return {name: sorted(points, key=lambda p: p[0]) for name, points in found.items()}


def _topology(rows: Sequence[Mapping[str, Any]], offsets: Mapping[int, float]) -> dict[str, Points]:
    found: dict[str, Points] = {"churn": [], "exploration_rate": [], "drop_fraction": [], "loss_spike": []}
    for row in rows:
        if row["event"] == "mask":
            if "level" not in row:  # each of several fits counts its own exploration
                found["exploration_rate"].append((_at(row, offsets), row["exploration_rate"]))
            if row["updates"]:
                for name in ("churn", "drop_fraction"):
                    found[name].append((_at(row, offsets), row[name]))
        if row["event"] == "loss" and row["spike"] is not None:
            found["loss_spike"].append((offsets[int(row.get("level", 0))] + float(row["update"]), row["spike"]))
    return found


def _layers(rows: Sequence[Mapping[str, Any]], offsets: Mapping[int, float]) -> Layers:
    none: dict[str, Any] = {"names": [], "shapes": [], "weights": []}
    head = next((row for row in rows if row["event"] == "layers"), none)
    names, weights = list(map(str, head["names"])), list(map(int, head["weights"]))
    shapes = [list(map(int, shape)) for shape in head["shapes"]]
    observed = [row for row in rows if row["event"] in ("mask", "epoch", "end")]

    def over_time(key: str, scaled: bool = False) -> list[Points]:
        return [
            [(_at(row, offsets), row[key][i] / (weights[i] if scaled else 1)) for row in observed if key in row]
            for i in range(len(names))
        ]

    return Layers(
        names, shapes, weights, over_time("active", scaled=True), over_time("dead_inputs"), over_time("dead_outputs"),
        over_time("effective"),
    )  # fmt: skip
