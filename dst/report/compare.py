"""Comparing runs: means with confidence intervals over seeds, paired differences between methods, Pareto fronts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from dst.errors import ConfigurationError, DataError
from dst.report.runs import Run, read_runs
from dst.report.statistics import Interval, interval, pareto_front

__all__ = ["COSTS", "QUALITY", "Comparison", "Difference", "Group", "Run", "compare", "is_cost", "read_runs"]

QUALITY = "test.accuracy"
"""The number that methods are compared by, in [0, 1]."""

COSTS = ("flops.", "memory.", "latency.", "energy.")
"""Prefixes of the names of costs in ``summary.json``."""

_SHOWN = (QUALITY, "test.loss", "density.realised")
_ALL_PAIRS = 6
"""Number of groups up to which every pair is compared."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
        label: The method, its density and the settings that vary.
        runs: Seed to run.
        intervals: Name of a number to its interval over the runs where it is finite.
    """

    label: str
    runs: Mapping[int, Run]
    intervals: Mapping[str, Interval]


@dataclass(frozen=True)
class Difference:
    """Two groups, compared seed by seed.

    Attributes:
        first: Label of the first group.
        second: Label of the second group.
        seeds: The seeds of both.
        interval: Interval of first minus second, in `QUALITY`.
    """

    first: str
    second: str
    seeds: tuple[int, ...]
    interval: Interval


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`. ``dst.report.comparison_output`` shows and writes it.

    Attributes:
        metrics: Names of the numbers shown, `QUALITY` first.
        groups: Groups in the order of the runs given.
        differences: Differences between groups that share two seeds or more.
        fronts: Cost to labels of the groups on its Pareto front, cheapest first.
        notes: What a reader has to know.
    """

    metrics: tuple[str, ...]
    groups: tuple[Group, ...]
    differences: tuple[Difference, ...]
    fronts: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]


def compare(runs: Sequence[Run], baseline: str | None = None) -> Comparison:
    """Compare runs.

    Args:
        runs: Finished runs, from `read_runs`.
        baseline: Label of the group that is subtracted from all others. None compares every pair of up to six groups, and
            compares more groups with the first one.

    Returns:
        The comparison.

    Raises:
        DataError: There are no runs, or two have the same settings and seed.
        ConfigurationError: No group has the label ``baseline``.
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


def is_cost(name: str) -> bool:
    """Whether a number in ``summary.json`` is a cost. Parts of a cost and measuring conditions are not."""
    return name.startswith(COSTS) and name.count(".") == 1


def _metrics(runs: Sequence[Run]) -> tuple[str, ...]:
    names = dict.fromkeys(name for run in runs for name in run.values)
    return (*(name for name in _SHOWN if name in names), *(name for name in names if is_cost(name)))


def _grouped(runs: Sequence[Run]) -> tuple[dict[str, dict[int, Run]], list[str]]:
    """Runs by label and seed, and notes on their settings."""
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
                continue  # a sweep over densities repeats the dense run: the first one counts
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
        notes.append(f"the methods differ in settings that are not their own: {', '.join(different)}")
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
