"""Comparing runs: means with confidence intervals over seeds, paired differences between methods, Pareto fronts."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dst.checkpoints import write_atomically
from dst.errors import ConfigurationError, DataError
from dst.report.summary import SUMMARY_FILE

QUALITY = "test.accuracy"
"""What methods are compared by: of the last weights, in [0, 1]."""

COSTS = ("flops.", "memory.", "latency.", "energy.")
"""Beginnings of the names of numbers in ``summary.json`` that cost something."""

_SHOWN = (QUALITY, "test.loss", "density.realised")
_NOT_SETTINGS = ("seed", "resume", "threads", "logger", "hydra", "data.root", "data.download", "trainer.enable_")
_ALL_PAIRS = 6

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom.
_T95 = (
    12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139,
    2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963,
    2.079614, 2.073873, 2.068658, 2.063899, 2.059539, 2.055529, 2.051831, 2.048407, 2.045230, 2.042272,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: Where it is.
        method: The method's name.
        seed: Its seed.
        values: Numbers of its summary by dotted name; None where not finite.
        settings: Its settings by dotted name, without the seed and what does not matter for results.
    """

    folder: Path
    method: str
    seed: int
    values: Mapping[str, float | None]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% confidence interval.

    Attributes:
        mean: Of ``n`` values.
        half: Half the width of the interval; None for a single value.
        n: Number of values.
    """

    mean: float
    half: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.half is None else f"{self.mean:.4g} ± {self.half:.2g}"

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.half is not None and abs(self.mean) > self.half


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
        label: The method, its density and what else varies.
        runs: By seed.
        intervals: Name to interval over the runs whose number is finite.
    """

    label: str
    runs: Mapping[int, Run]
    intervals: Mapping[str, Interval]


@dataclass(frozen=True)
class Difference:
    """A pair of groups, compared seed by seed.

    Attributes:
        first: A label.
        second: Another.
        seeds: Those that both have.
        interval: Of first minus second, in `QUALITY`.
    """

    first: str
    second: str
    seeds: tuple[int, ...]
    interval: Interval


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        metrics: Names of the numbers shown, `QUALITY` first.
        groups: In the order of the runs given.
        differences: Between groups that share two seeds or more.
        fronts: Cost to labels of the groups on its Pareto front, cheapest first.
        notes: What a reader has to know.
    """

    metrics: tuple[str, ...]
    groups: tuple[Group, ...]
    differences: tuple[Difference, ...]
    fronts: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]

    def rows(self, metrics: Sequence[str] | None = None) -> Iterator[list[str]]:
        """The table of groups as text, header first; groups on a front are marked by a star in its column.

        Args:
            metrics: Numbers to show; None for all.
        """
        metrics = self.metrics if metrics is None else metrics
        yield ["runs", "seeds", *metrics]
        for group in self.groups:
            cells = []
            for metric in metrics:
                interval = group.intervals.get(metric)
                star = " *" if group.label in self.fronts.get(metric, ()) else ""
                cells.append("" if interval is None else f"{interval}{star}")
            yield [group.label, str(len(group.runs)), *cells]

    def kinds(self) -> list[list[str]]:
        """The numbers in groups that make tables of bearable width: accuracy and the like, then each kind of cost."""
        found: dict[str, list[str]] = {}
        for metric in self.metrics:
            found.setdefault(metric.partition(".")[0] if is_cost(metric) else "", []).append(metric)
        return list(found.values())

    def difference_rows(self) -> Iterator[list[str]]:
        """The table of differences as text, header first."""
        yield [f"difference in {QUALITY}", "seeds", "first - second", "zero is"]
        for d in self.differences:
            inside = "outside" if d.interval.excludes_zero else "inside"
            yield [
                f"{d.first} - {d.second}",
                str(len(d.seeds)),
                f"{d.interval.mean:+.4g} ± {d.interval.half:.2g}",
                inside,
            ]

    def renderable(self) -> Lines:
        """Return the comparison as tables for ``rich``: of accuracy and the like, and of each kind of cost."""
        parts: list[RenderableType] = []
        for metrics in self.kinds():
            parts += [_rich(self.rows(metrics)), Text()]
        if self.differences:
            parts += [_rich(self.difference_rows()), Text()]
        return Lines(*parts, *(Text(note, style="dim") for note in (_LEGEND, *self.notes)))

    def markdown(self) -> str:
        """The comparison as Markdown."""
        tables = [_markdown(self.rows(metrics)) for metrics in self.kinds()] + (
            [_markdown(self.difference_rows())] if self.differences else []
        )
        return "\n\n".join([*tables, *(note.replace("*", "\\*") for note in (_LEGEND, *self.notes))]) + "\n"

    def csv(self) -> str:
        """One line per group: its label, seeds, and of every number the mean, the half width and the count."""
        names = [f"{metric} {part}" for metric in self.metrics for part in ("mean", "ci95", "n")]
        lines: list[list[Any]] = [["runs", "seeds", *names, *(f"on front of {cost}" for cost in self.fronts)]]
        for group in self.groups:
            cells: list[Any] = []
            for metric in self.metrics:
                interval = group.intervals.get(metric)
                cells += ["", "", 0] if interval is None else [interval.mean, interval.half, interval.n]
            fronts = [int(group.label in front) for front in self.fronts.values()]
            lines.append([group.label, " ".join(map(str, sorted(group.runs))), *cells, *fronts])
        return _csv(lines)

    def differences_csv(self) -> str:
        """One line per pair of groups."""
        lines: list[list[Any]] = [["first", "second", "seeds", "mean", "ci95"]]
        for d in self.differences:
            lines.append([d.first, d.second, " ".join(map(str, d.seeds)), d.interval.mean, d.interval.half])
        return _csv(lines)

    def html(self) -> str:
        """The comparison as one page that needs no network, with a Pareto plot for every cost."""
        plots = "".join(_plot(self, cost) for cost in self.fronts)
        differences = _html_table(self.difference_rows()) if self.differences else ""
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in (_LEGEND, *self.notes))
        tables = "".join(_html_table(self.rows(metrics)) for metrics in self.kinds())
        body = f"<h1>Comparison</h1>{tables}{differences}{notes}<div class=plots>{plots}</div>"
        return f"<!doctype html><html lang=en><head>{_HEAD}</head><body>{body}</body></html>\n"

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write ``compare.csv``, ``differences.csv``, ``compare.md`` and ``compare.html`` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            "compare.csv": self.csv(),
            "differences.csv": self.differences_csv(),
            "compare.md": self.markdown(),
            "compare.html": self.html(),
        }
        for name, text in files.items():
            write_atomically(folder / name, text)
        return [folder / name for name in files]


_LEGEND = (
    "Mean ± half a 95% confidence interval over seeds (Student's t). * marks the Pareto front of accuracy against that cost. "
    "Differences are paired by seed; their intervals are not corrected for comparing several pairs."
)


def compare(runs: Sequence[Run], baseline: str | None = None) -> Comparison:
    """Compare runs.

    Args:
        runs: Finished runs, from `read_runs`.
        baseline: Label of the group that all others are subtracted from; None compares every pair if there are at most six
            groups, and else all with the first.

    Returns:
        The comparison.

    Raises:
        DataError: No runs, or two with the same settings and seed.
        ConfigurationError: No group has the baseline's label.
    """
    if not runs:
        raise DataError("there are no runs to compare")
    grouped, notes = _grouped(runs)
    metrics = _metrics(runs)
    groups = []
    for label, members in grouped.items():
        intervals = {}
        for metric in metrics:
            values = [value for run in members.values() if (value := run.values.get(metric)) is not None]
            if values:
                intervals[metric] = interval(values)
            if metric == QUALITY and len(values) < len(members):
                notes.append(f"{label}: {len(members) - len(values)} of {len(members)} runs have no finite {metric}")
        groups.append(Group(label, members, intervals))
    fronts = {}
    for metric in metrics:
        if is_cost(metric):
            points = {
                g.label: (g.intervals[metric].mean, g.intervals[QUALITY].mean)
                for g in groups
                if metric in g.intervals and QUALITY in g.intervals
            }
            fronts[metric] = pareto_front(points)
    return Comparison(metrics, tuple(groups), tuple(_differences(groups, baseline)), fronts, tuple(notes))


def read_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Read finished runs.

    Args:
        paths: Folders of runs, or folders that hold such at any depth.

    Returns:
        The runs, each once, in the order of the paths.

    Raises:
        DataError: A path without a finished run, or a summary that cannot be read.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        summaries = sorted(path.rglob(SUMMARY_FILE))
        if not summaries:
            raise DataError(f"there is no finished run in {path}: no {SUMMARY_FILE}")
        found.update(dict.fromkeys(summary.parent.resolve() for summary in summaries))
    return [_read(folder) for folder in found]


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95% confidence interval (Student's t) of values, at least one."""
    n, mean = len(values), statistics.mean(values)  # exact: equal values have that mean, and no width
    if n == 1:
        return Interval(mean, None, 1)
    return Interval(mean, student_t95(n - 1) * statistics.stdev(values) / math.sqrt(n), n)


def student_t95(degrees: int) -> float:
    """Two-sided 95% quantile of Student's t; beyond 30 degrees by Hill's expansion, to six digits.

    Raises:
        ConfigurationError: Fewer than one degree of freedom.
    """
    if degrees < 1:
        raise ConfigurationError(f"Student's t needs at least one degree of freedom, got {degrees}")
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    z = 1.959963984540054
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees ** (i + 1) for i, term in enumerate(terms))


def is_cost(name: str) -> bool:
    """Whether a number in ``summary.json`` is a cost: not the parts that one is made of, nor what it was measured under."""
    return name.startswith(COSTS) and name.count(".") == 1


def pareto_front(points: Mapping[str, tuple[float, float]]) -> tuple[str, ...]:
    """Labels of the points that no other beats.

    Args:
        points: Label to cost (low is good) and quality (high is good).

    Returns:
        Labels, cheapest first; one is left out if another is at least as good in both and better in one.
    """
    front = [
        label
        for label, (cost, quality) in points.items()
        if not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points.values())
    ]
    return tuple(sorted(front, key=lambda label: points[label]))


def _read(folder: Path) -> Run:
    path = folder / SUMMARY_FILE
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        method, seed = str(summary["sparsity"]), int(summary["seed"])
        values = {name: value for name, value in _flat(summary) if value is None or type(value) in (int, float)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is not a run's summary: {type(error).__name__} {error}") from error
    config = folder / ".hydra" / "config.yaml"
    settings: dict[str, Any] = {"density": summary.get("density", {}).get("target")}
    if config.is_file():
        try:
            loaded = OmegaConf.to_container(OmegaConf.load(config), resolve=False)
        except Exception as error:  # the parser's own, of several kinds
            raise DataError(f"{config} cannot be read: {str(error).splitlines()[0]}") from error
        settings = {name: value for name, value in _flat(loaded) if not name.startswith(_NOT_SETTINGS)}
    return Run(folder, method, seed, values, settings)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and leaves; lists are leaves."""
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))


def _metrics(runs: Sequence[Run]) -> tuple[str, ...]:
    names = dict.fromkeys(name for run in runs for name in run.values)
    return (*(name for name in _SHOWN if name in names), *(name for name in names if is_cost(name)))


def _grouped(runs: Sequence[Run]) -> tuple[dict[str, dict[int, Run]], list[str]]:
    """Runs by label and seed, and what has to be said about their settings."""
    methods: dict[str, list[Run]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    groups: dict[str, dict[int, Run]] = {}
    for method, members in methods.items():
        names = dict.fromkeys(name for run in members for name in run.settings)
        varying = [n for n in names if n != "density" and len({repr(run.settings.get(n)) for run in members}) > 1]
        for run in members:
            density = run.settings.get("density")
            parts = [method, *([f"density={density}"] if density is not None and method != "dense" else [])]
            label = " ".join([*parts, *(f"{name}={run.settings.get(name)}" for name in varying)])
            same = groups.setdefault(label, {})
            if run.seed in same and method == "dense" and density != same[run.seed].settings.get("density"):
                continue  # a sweep over densities trains the dense network once for each: the first one counts
            if run.seed in same:
                raise DataError(
                    f"{same[run.seed].folder} and {run.folder} are both runs of {label} with seed {run.seed}: leave one out"
                )
            same[run.seed] = run
    notes = []
    firsts = [members[0].settings for members in methods.values()]
    common = dict.fromkeys(name for settings in firsts for name in settings if not name.startswith("sparsity."))
    different = [n for n in common if n != "density" and len({repr(s.get(n)) for s in firsts}) > 1]
    if different:
        notes.append(f"methods were run with different settings beside their own: {', '.join(different)}")
    return groups, notes


def _differences(groups: Sequence[Group], baseline: str | None) -> Iterator[Difference]:
    if baseline is not None:
        chosen = [g for g in groups if g.label == baseline]
        if not chosen:
            raise ConfigurationError(f"baseline={baseline!r} is none of {', '.join(repr(g.label) for g in groups)}")
        pairs = [(g, chosen[0]) for g in groups if g is not chosen[0]]
    elif len(groups) <= _ALL_PAIRS:
        pairs = list(combinations(groups, 2))
    else:
        pairs = [(g, groups[0]) for g in groups[1:]]
    for first, second in pairs:
        differences = {}
        for seed in sorted(first.runs.keys() & second.runs.keys()):
            a, b = (group.runs[seed].values.get(QUALITY) for group in (first, second))
            if a is not None and b is not None:
                differences[seed] = a - b
        if len(differences) > 1:
            yield Difference(first.label, second.label, tuple(differences), interval(list(differences.values())))


def _rich(rows: Iterator[list[str]]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 3, 0, 0), pad_edge=False)
    for i, name in enumerate(next(rows)):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _markdown(rows: Iterator[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in row) + " |" for row in rows]
    columns = lines[0].count(" | ") + 1
    return "\n".join([lines[0], "|---" + "|---:" * (columns - 1) + "|", *lines[1:]])


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(["" if c is None else c for c in line] for line in lines)
    return text.getvalue()


_HEAD = """<meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1"><title>Comparison</title>
<style>
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #767676; --line: #d0d0d0; --mark: #0b6e4f; --paper: #fff }
@media (prefers-color-scheme: dark) { :root { --ink: #eee; --soft: #999; --line: #444; --mark: #5fd3a8; --paper: #111 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70rem; margin: 0 auto;
  padding: 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1rem; margin: 0 }
.scroll { overflow-x: auto; margin: 1rem 0 } table { border-collapse: collapse; white-space: nowrap }
th, td { text-align: right; padding: .3rem .8rem; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left } th { color: var(--soft); font-weight: normal }
p { color: var(--soft); max-width: 45rem } .plots { display: grid; gap: 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
svg { width: 100%; height: auto } svg text { fill: var(--ink); font-size: 11px } svg .soft { fill: var(--soft) }
</style>"""


def _html_table(rows: Iterator[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in next(rows))
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _plot(comparison: Comparison, cost: str, width: int = 460, height: int = 300) -> str:
    """Accuracy against one cost: a point with its interval for every group, and a line through the front."""
    groups = [g for g in comparison.groups if cost in g.intervals and QUALITY in g.intervals]
    if not groups:
        return ""
    left, right, top, bottom = 55, 20, 15, 40
    costs = [g.intervals[cost].mean for g in groups]
    edges = [g.intervals[QUALITY].mean + s * (g.intervals[QUALITY].half or 0) for g in groups for s in (-1, 1)]
    (x0, x1), (y0, y1) = _padded(costs), _padded(edges)

    def x(value: float) -> float:
        return left + (value - x0) / (x1 - x0) * (width - left - right)

    def y(value: float) -> float:
        return height - bottom - (value - y0) / (y1 - y0) * (height - top - bottom)

    marks = []
    for i in range(5):
        u, v = x0 + (x1 - x0) * i / 4, y0 + (y1 - y0) * i / 4
        marks.append(f"<text class=soft x={x(u):.1f} y={height - 22} text-anchor=middle>{u:.3g}</text>")
        marks.append(f"<text class=soft x={left - 6} y={y(v) + 4:.1f} text-anchor=end>{v:.4g}</text>")
        marks.append(f'<path d="M{left} {y(v):.1f}H{width - right}" stroke="var(--line)"/>')
    by_label = {g.label: g for g in groups}
    front = [by_label[label] for label in comparison.fronts[cost]]
    corners = " ".join(f"{x(g.intervals[cost].mean):.1f},{y(g.intervals[QUALITY].mean):.1f}" for g in front)
    marks.append(f'<polyline class=front points="{corners}" fill="none" stroke="var(--mark)" stroke-dasharray="4 3"/>')
    for group in groups:
        cx, quality = x(group.intervals[cost].mean), group.intervals[QUALITY]
        colour = "var(--mark)" if group in front else "var(--soft)"
        if quality.half is not None:
            low, high = y(quality.mean - quality.half), y(quality.mean + quality.half)
            marks.append(f'<path d="M{cx:.1f} {low:.1f}V{high:.1f}" stroke="{colour}"/>')
        label, cy = html.escape(group.label), y(quality.mean)
        end = cx > width * 0.6
        marks.append(f'<circle cx={cx:.1f} cy={cy:.1f} r=4 fill="{colour}"><title>{label}: {quality}</title></circle>')
        place = f"x={cx + (-8 if end else 8):.1f} y={cy - 6:.1f} text-anchor={'end' if end else 'start'}"
        marks.append(f"<text {place}>{label}</text>")
    name = html.escape(cost)
    marks.append(f"<text class=soft x={(left + width - right) / 2:.1f} y={height - 6} text-anchor=middle>{name}</text>")
    title = f"{QUALITY} against {name}"
    picture = f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{title}">{"".join(marks)}</svg>'
    return f"<figure style='margin:0'><h2>{title}</h2>{picture}</figure>"


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    space = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    return low - space, high + space
