"""A comparison as tables for the terminal, Markdown, CSV and one HTML page."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.text import Text

from dst.checkpoints import write_atomically
from dst.report.charts import Axis, Point, point_chart
from dst.report.compare import QUALITY, Comparison, is_cost
from dst.report.figures import Figure, Table
from dst.report.templating import fill
from dst.report.terminal import terminal_table
from dst.tables import csv_table, markdown_table

_LEGEND = (
    "Mean ± half a 95% confidence interval over seeds (Student's t). * marks the Pareto front of accuracy against that cost. "
    "Differences are paired by seed. Their intervals are not corrected for comparing several pairs."
)


def comparison_tables(comparison: Comparison) -> Iterator[list[list[str]]]:
    """The tables of a comparison as rows of text, header first.

    The first tables have a row for each group and columns for its numbers: accuracy and the like, then each kind of cost. A
    star marks groups on the Pareto front of that cost. The last table has the differences, if there are any.
    """
    kinds: dict[str, list[str]] = {}
    for metric in comparison.metrics:
        kinds.setdefault(metric.partition(".")[0] if is_cost(metric) else "", []).append(metric)
    for metrics in kinds.values():
        yield [["runs", "seeds", *metrics], *_group_rows(comparison, metrics)]
    if comparison.differences:
        yield [[f"difference in {QUALITY}", "seeds", "first - second", "zero is"], *_difference_rows(comparison)]


def renderable(comparison: Comparison) -> Lines:
    """Return the comparison as tables for ``rich``."""
    parts: list[RenderableType] = []
    for rows in comparison_tables(comparison):
        parts += [terminal_table(rows), Text()]
    return Lines(*parts, *(Text(note, style="dim") for note in _notes(comparison)))


def markdown(comparison: Comparison) -> str:
    """Return the comparison as Markdown."""
    tables = [markdown_table(rows, right=range(1, len(rows[0]))) for rows in comparison_tables(comparison)]
    return "\n\n".join([*tables, *(note.replace("*", "\\*") for note in _notes(comparison))]) + "\n"


def groups_csv(comparison: Comparison) -> str:
    """One line per group: its label, its seeds, and the mean, the half width and the count of every number."""
    names = [f"{metric} {part}" for metric in comparison.metrics for part in ("mean", "ci95", "n")]
    lines: list[list[Any]] = [["runs", "seeds", *names, *(f"on front of {cost}" for cost in comparison.fronts)]]
    for group in comparison.groups:
        cells: list[Any] = []
        for metric in comparison.metrics:
            interval = group.intervals.get(metric)
            cells += ["", "", 0] if interval is None else [interval.mean, interval.half, interval.n]
        fronts = [int(group.label in front) for front in comparison.fronts.values()]
        lines.append([group.label, " ".join(map(str, sorted(group.runs))), *cells, *fronts])
    return csv_table(lines)


def differences_csv(comparison: Comparison) -> str:
    """One line per pair of groups."""
    lines: list[list[Any]] = [["first", "second", "seeds", "mean", "ci95"]]
    for d in comparison.differences:
        lines.append([d.first, d.second, " ".join(map(str, d.seeds)), d.interval.mean, d.interval.half])
    return csv_table(lines)


def page(comparison: Comparison) -> str:
    """Return the comparison as one HTML page that needs no network, with a Pareto plot for every cost."""
    tables = [Table(rows[0], rows[1:], rows[0][0], kind="whole") for rows in comparison_tables(comparison)]
    plots = [plot for cost in comparison.fronts if (plot := _plot(comparison, cost)) is not None]
    return fill("comparison.html", title="Comparison", tables=tables, notes=_notes(comparison), plots=plots)


def write_comparison(comparison: Comparison, folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``compare.csv``, ``differences.csv``, ``compare.md`` and ``compare.html`` into a folder.

    Returns:
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "compare.csv": groups_csv(comparison),
        "differences.csv": differences_csv(comparison),
        "compare.md": markdown(comparison),
        "compare.html": page(comparison),
    }
    for name, text in files.items():
        write_atomically(folder / name, text)
    return [folder / name for name in files]


def _group_rows(comparison: Comparison, metrics: Sequence[str]) -> Iterator[list[str]]:
    for group in comparison.groups:
        cells = []
        for metric in metrics:
            interval = group.intervals.get(metric)
            star = " *" if group.label in comparison.fronts.get(metric, ()) else ""
            cells.append("" if interval is None else f"{interval}{star}")
        yield [group.label, str(len(group.runs)), *cells]


def _difference_rows(comparison: Comparison) -> Iterator[list[str]]:
    for d in comparison.differences:
        inside = "outside" if d.interval.excludes_zero else "inside"
        difference = f"{d.interval.mean:+.4g} ± {d.interval.half:.2g}"
        yield [f"{d.first} - {d.second}", str(len(d.seeds)), difference, inside]


def _notes(comparison: Comparison) -> tuple[str, ...]:
    return (_LEGEND, *comparison.notes)


def _plot(comparison: Comparison, cost: str) -> Figure | None:
    """Accuracy against a cost: a point with its interval for every group, and a line through the front."""
    front = comparison.fronts[cost]
    points = {
        group.label: Point(
            group.label,
            group.intervals[cost].mean,
            group.intervals[QUALITY].mean,
            group.intervals[QUALITY].half,
            series=0 if group.label in front else None,
        )
        for group in comparison.groups
        if cost in group.intervals and QUALITY in group.intervals
    }
    if not points:
        return None
    title = f"{QUALITY} against {cost}"
    across = _padded_axis(cost, ".3g", [point.x for point in points.values()])
    edges = [point.y + side * (point.half or 0.0) for point in points.values() for side in (-1, 1)]
    up = _padded_axis(QUALITY, ".4g", edges)
    corners = [(points[label].x, points[label].y) for label in front]
    return Figure(title, point_chart(f"{cost}-plot", title, list(points.values()), across, up, corners))


def _padded_axis(label: str, spec: str, values: Sequence[float]) -> Axis:
    """An axis with some room beyond the values, also around a single one."""
    low, high = min(values), max(values)
    space = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    return Axis(label, lambda value: format(value, spec), low=low - space, high=high + space)
