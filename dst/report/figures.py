"""What a page consists of: figures and tables as values, which ``templates/parts.html`` turns into HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from dst.report.charts import MOST_LINES, Axis, Line, heat_map, line_chart, thin

Form: TypeAlias = Callable[[float], str]
"""Turns a number into text."""

MOST_ROWS = 60
"""Rows of a table of numbers. Longer curves are thinned."""


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        header: Names of the columns.
        rows: Cells, as many as there are columns.
        label: What the table is about, for screen readers.
        kind: What happens where there is no room: the table scrolls within its place ("scroll", limited in height, or
            "whole"), or its rows become lists ("stacked").
        title: What opens the table where it is folded.
        note: Shown above a folded table.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    label: str
    kind: Literal["scroll", "whole", "stacked"] = "scroll"
    title: str = "Numbers"
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A chart.

    Attributes:
        caption: What it shows.
        chart: An ``svg`` element from `dst.report.charts`.
        legend: Names of the lines in their order; empty for none.
        numbers: The chart's numbers, folded below it.
    """

    caption: str
    chart: str
    legend: Sequence[str] = ()
    numbers: Table | None = None


@dataclass(frozen=True)
class Section:
    """A section of the report, in the order in which its parts are shown.

    Attributes:
        absent: Why there is nothing to show.
        warnings: Lines that need attention.
        facts: Names and values.
        notes: Remarks.
        figures: Charts side by side.
        more_figures: Further ones, folded.
        table: A table, folded unless it is stacked.
        code: Preformatted text.
    """

    absent: str = ""
    warnings: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    more_figures: Sequence[Figure] = ()
    table: Table | None = None
    code: str = ""


def line_figure(
    key: str, caption: str, lines: Sequence[Line], x: Axis, y: Axis, levels: Sequence[float], form: Form
) -> Figure:
    """A chart of lines with its legend and its numbers.

    Args:
        key: Unique on the page.
        caption: What it shows.
        lines: At most `MOST_LINES`, over optimizer steps.
        x: The axis of steps.
        y: The axis of values.
        levels: Steps that are marked.
        form: Formats the values in the table.
    """
    steps = sorted({step for line in lines for step, _ in line.points})
    chosen = [step for step, _ in thin([(step, 0.0) for step in steps], MOST_ROWS)]
    values = [dict(line.points) for line in lines]
    rows = [[f"{step:,.0f}", *(form(v[step]) if step in v else "" for v in values)] for step in chosen]
    note = "" if len(chosen) == len(steps) else f"{len(chosen)} of {len(steps):,} steps, evenly spaced"
    names = [line.name for line in lines]
    needs_legend = len(lines) > 1 or names[0].lower() not in caption.lower()
    return Figure(
        caption,
        line_chart(key, caption, lines, x, y, levels),
        names if needs_legend else (),
        Table(["step", *names], rows, caption, note=note),
    )


def layers_figure(
    key: str, caption: str, lines: Sequence[Line], x: Axis, y: Axis, levels: Sequence[float], form: Form
) -> Figure:
    """A line for each layer, or a row of colours for each where lines could not be told apart; see `line_figure`."""
    if len(lines) <= MOST_LINES:
        return line_figure(key, caption, lines, x, y, levels, form)
    rows = [[line.name, form(line.points[0][1]), form(line.points[-1][1])] for line in lines]
    chart = heat_map(key, f"{caption} of {len(lines)} layers", lines, x, y)
    return Figure(caption, chart, numbers=Table(["layer", "first", "last"], rows, caption))
