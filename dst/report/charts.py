"""Small SVG charts: pure functions from numbers to text.

A report is one file without scripts, so the charts are part of it. Each chart is an ``svg`` element that scales with the
space it is given (``viewBox``, no width). Colours come from the page's variables, which also serve dark mode. ``title`` and
``desc`` describe the chart for screen readers.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 360, 220
"""Size in user units, about the width of a phone, where text then keeps its size."""

MOST_LINES = 8
"""Number of lines that colour and dash can tell apart."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 34
_POINTS = 240
_STOPS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=float)


@dataclass(frozen=True)
class Line:
    """A named curve: points (x, y), ordered by x."""

    name: str
    points: Sequence[tuple[float, float]]


class Point(NamedTuple):
    """A named point.

    Attributes:
        name: Shown beside the point.
        x: Position along the axis below.
        y: Position along the axis on the left.
        half: Half the height of the interval that is drawn through the point; None draws none.
        series: Index of the page's colour, from 0 to `MOST_LINES` - 1; None is grey.
    """

    name: str
    x: float
    y: float
    half: float | None = None
    series: int | None = 0


@dataclass(frozen=True)
class Axis:
    """An axis and its labels.

    Attributes:
        label: Text along the axis.
        form: Turns a number into text.
        low: Lower end; None takes the least number shown.
        high: Upper end; None takes the greatest number shown.
    """

    label: str
    form: Callable[[float], str] = field(default=lambda value: f"{value:.4g}")
    low: float | None = None
    high: float | None = None


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Choose round numbers within an interval.

    Args:
        low: Lower end of the interval.
        high: Upper end, at least ``low``.
        most: Largest number of ticks, at least 2.

    Returns:
        Multiples of 1, 2, 2.5 or 5 times a power of ten, ascending. An empty interval gives ``low`` alone.
    """
    if not high > low:
        return [low]
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def thin(points: Sequence[tuple[float, float]], most: int = _POINTS) -> list[tuple[float, float]]:
    """Keep at most ``most`` points, evenly spaced. The first and the last stay."""
    if len(points) <= most:
        return list(points)
    chosen = sorted({round(i * (len(points) - 1) / (most - 1)) for i in range(most)})
    return [points[i] for i in chosen]


def compact(value: float) -> str:
    """Format a number in few characters, such as 1200 as ``1.2k``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def line_chart(key: str, title: str, lines: Sequence[Line], x: Axis, y: Axis, marks: Sequence[float] = ()) -> str:
    """Draw curves over a common axis.

    Args:
        key: Prefix of the ids, unique on the page.
        title: What the chart shows.
        lines: At most `MOST_LINES`, with at least one point in all.
        x: The axis below.
        y: The axis on the left.
        marks: Positions of vertical lines.

    Returns:
        An ``svg`` element.
    """
    drawn = [Line(line.name, thin(line.points)) for line in lines]
    frame = _Frame([p[0] for line in drawn for p in line.points], [p[1] for line in drawn for p in line.points], x, y)
    parts = [frame.grid()]
    parts += [f'<path class="mark" d="M{frame.x(m):.1f} {_TOP}V{HEIGHT - _BOTTOM}"/>' for m in marks]
    for i, line in enumerate(drawn):
        corners = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in line.points)
        if len(line.points) > 1:
            parts.append(f'<polyline class="line s{i}" points="{corners}"/>')
        if 0 < len(line.points) <= 3:
            parts += [_dot(frame.x(a), frame.y(b), i) for a, b in line.points]
    ends = "; ".join(f"{line.name}: {_range(line.points, y)}" for line in drawn if line.points)
    return _svg(key, title, ends, "".join(parts))


def point_chart(
    key: str, title: str, points: Sequence[Point], x: Axis, y: Axis, front: Sequence[tuple[float, float]] = ()
) -> str:
    """Draw single points with their names, and their intervals where they have one.

    Args:
        key: See `line_chart`.
        title: See `line_chart`.
        points: At least one.
        x: The axis below.
        y: The axis on the left.
        front: Corners of a dashed line, such as a Pareto front.

    Returns:
        An ``svg`` element.
    """
    edges = [p.y + side * (p.half or 0.0) for p in points for side in (-1, 1)]
    frame = _Frame([p.x for p in points], edges, x, y)
    parts = [frame.grid()]
    if front:
        corners = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in front)
        parts.append(f'<polyline class="front" points="{corners}"/>')
    described = [_described(point, x, y) for point in points]
    for i, (point, text) in enumerate(zip(points, described, strict=True)):
        across, down = frame.x(point.x), frame.y(point.y)
        if point.half is not None:
            low, high = frame.y(point.y - point.half), frame.y(point.y + point.half)
            parts.append(f'<path class="whisker {_colour(point.series)}" d="M{across:.1f} {low:.1f}V{high:.1f}"/>')
        parts.append(_dot(across, down, point.series, text))
        # Names alternate between below and above, so that those of neighbours do not overlap.
        is_right = across > WIDTH / 2
        beside = 2 if point.half is None else 6
        place = f'x="{across + (-beside if is_right else beside):.1f}" y="{down + (18 if i % 2 else -10):.1f}"'
        anchor = "end" if is_right else "start"
        parts.append(f'<text {place} text-anchor="{anchor}">{html.escape(point.name)}</text>')
    return _svg(key, title, "; ".join(described), "".join(parts))


def bar_chart(key: str, title: str, first: int, width: int, counts: Sequence[int], x: Axis, y: Axis) -> str:
    """Draw a histogram with bins of equal width.

    Args:
        key: See `line_chart`.
        title: See `line_chart`.
        first: Smallest value of the first bin.
        width: Width of a bin.
        counts: Count of each bin.
        x: The axis below.
        y: The axis on the left.

    Returns:
        An ``svg`` element.
    """
    frame = _Frame([first, first + width * len(counts)], [0, max(counts)], x, y)
    parts = [frame.grid()]
    for i, count in enumerate(counts):
        left, right = frame.x(first + i * width), frame.x(first + (i + 1) * width)
        top, size = frame.y(count), max(0.5, right - left - 1)
        parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{size:.1f}" height="{frame.y(0) - top:.1f}"/>'
        )
    described = f"{sum(counts)} in {len(counts)} bins from {first} to {first + width * len(counts) - 1}"
    return _svg(key, title, described, "".join(parts))


def heat_map(key: str, title: str, lines: Sequence[Line], x: Axis, y: Axis) -> str:
    """Draw each curve as a row of colours, for more curves than lines can tell apart.

    The arguments are those of `line_chart`. Rows have the names of the lines. ``y`` formats the labels of the scale.
    """
    columns, row = 60, 14
    times = [p[0] for line in lines for p in line.points]
    low = min(times) if x.low is None else x.low
    high = max(times)
    cells = np.array([_sampled(line.points, low, high, columns) for line in lines])
    image, least, greatest = colours(cells)
    left, height = 132, row * len(lines)
    labels = "".join(
        f'<text class="soft" x="{left - 5}" y="{row * i + 11}" text-anchor="end">{html.escape(_tail(line.name))}</text>'
        for i, line in enumerate(lines)
    )
    ends = "".join(
        f'<text class="soft" x="{at}" y="{height + 14}" text-anchor="{anchor}">{x.form(value)}</text>'
        for at, anchor, value in ((left, "start", low), (WIDTH - _RIGHT, "end", high))
    )
    axis = f'<text class="soft" x="{(left + WIDTH - _RIGHT) / 2}" y="{height + 14}" text-anchor="middle">{html.escape(x.label)}</text>'
    scale, below = _scale(left, height + 24, y.form(least), y.form(greatest))
    body = f"{_picture(image, left, 0, WIDTH - _RIGHT - left, height)}{labels}{ends}{axis}{scale}"
    return _svg(key, title, f"{len(lines)} layers, from {y.form(least)} to {y.form(greatest)}", body, height=below)


def pixel_map(key: str, title: str, counts: Sequence[Sequence[int]]) -> str:
    """Draw counts by position as an image, with the scale of colours below.

    Args:
        key: See `line_chart`.
        title: See `line_chart`.
        counts: Rows of equal length.

    Returns:
        An ``svg`` element.
    """
    cells = np.array(counts, dtype=float)
    image, least, greatest = colours(cells)
    rows, columns = cells.shape
    side = 220
    width, height = (side, side * rows / columns) if columns >= rows else (side * columns / rows, side)
    left = (WIDTH - width) / 2
    scale, below = _scale(left, height + 8, f"{least:.0f}", f"{greatest:.0f}", width)
    described = f"{rows} by {columns} places with {least:.0f} to {greatest:.0f} connections each"
    return _svg(key, title, described, _picture(image, left, 0, width, height) + scale, height=below)


def colours(cells: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Map numbers to colours, from dark violet (smallest) to yellow (largest). A larger number is lighter.

    Args:
        cells: Floats of shape (rows, columns). NaN means unknown and becomes grey.

    Returns:
        RGB values of dtype uint8 and shape (rows, columns, 3), the smallest and the largest number.
    """
    least, greatest = float(np.nanmin(cells)), float(np.nanmax(cells))
    unit = np.nan_to_num((cells - least) / ((greatest - least) or 1.0)) * (len(_STOPS) - 1)
    index = np.minimum(unit.astype(int), len(_STOPS) - 2)
    share = (unit - index)[..., None]
    image = _STOPS[index] * (1 - share) + _STOPS[index + 1] * share
    image[np.isnan(cells)] = 128
    return image.round().astype(np.uint8), least, greatest


def data_uri(image: np.ndarray) -> str:
    """Encode an RGB image (uint8, shape (rows, columns, 3)) as a PNG in a ``data:`` URI."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


class _Frame:
    """Maps numbers to positions in a chart with two axes."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], x: Axis, y: Axis) -> None:
        self.x_axis, self.y_axis = x, y
        self._x = _ends(xs, x, 0.0)
        self._y = _ends(ys, y, 0.06)

    def x(self, value: float) -> float:
        low, high = self._x
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    def grid(self) -> str:
        parts = []
        for value in ticks(*self._y):
            at = self.y(value)
            parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{WIDTH - _RIGHT}"/>')
            parts.append(
                f'<text class="soft" x="{_LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{self.y_axis.form(value)}</text>'
            )
        for value in ticks(*self._x, most=5):
            at = min(self.x(value), WIDTH - _RIGHT)
            anchor = "end" if at > WIDTH - 30 else "middle"
            parts.append(
                f'<text class="soft" x="{at:.1f}" y="{HEIGHT - 19}" text-anchor="{anchor}">{self.x_axis.form(value)}</text>'
            )
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        label = html.escape(self.x_axis.label)
        return "".join(parts) + f'<text class="soft" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{label}</text>'


def _ends(values: Sequence[float], axis: Axis, margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    space = (high - low) * margin
    low = axis.low if axis.low is not None else low - space
    high = axis.high if axis.high is not None else high + space
    return (low, high) if high > low else (low, low + (abs(low) or 1.0))


def _range(points: Sequence[tuple[float, float]], axis: Axis) -> str:
    return f"{axis.form(points[0][1])} first, {axis.form(points[-1][1])} last"


def _colour(series: int | None) -> str:
    return "soft" if series is None else f"s{series}"


def _described(point: Point, x: Axis, y: Axis) -> str:
    half = "" if point.half is None else f" ± {point.half:.2g}"
    return f"{point.name}: {x.form(point.x)}, {y.form(point.y)}{half}"


def _dot(x: float, y: float, series: int | None, hint: str = "") -> str:
    end = f"><title>{html.escape(hint)}</title></circle>" if hint else "/>"
    return f'<circle class="dot {_colour(series)}" cx="{x:.1f}" cy="{y:.1f}" r="4"{end}'


def _sampled(points: Sequence[tuple[float, float]], low: float, high: float, columns: int) -> list[float]:
    """The latest value at each of ``columns`` times. NaN before the first."""
    found, i, value = [], 0, math.nan
    for column in range(columns):
        time = low + (high - low) * (column + 1) / columns
        while i < len(points) and points[i][0] <= time:
            value = points[i][1]
            i += 1
        found.append(value)
    return found


def _tail(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _picture(image: np.ndarray, x: float, y: float, width: float, height: float) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<image {place} preserveAspectRatio="none" href="{data_uri(image)}"/>'


def _scale(x: float, y: float, least: str, greatest: str, width: float = WIDTH - _RIGHT - 132) -> tuple[str, float]:
    """A bar of colours with labelled ends, and the vertical position below it."""
    image, _, _ = colours(np.arange(64.0)[None])
    labels = "".join(
        f'<text class="soft" x="{at:.1f}" y="{y + 22:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
        for at, anchor, text in ((x, "start", least), (x + width, "end", greatest))
    )
    return _picture(image, x, y, width, 8) + labels, y + 28


def _svg(key: str, title: str, described: str, body: str, height: float = HEIGHT) -> str:
    key = html.escape(key)
    head = f'<title id="{key}-title">{html.escape(title)}</title><desc id="{key}-desc">{html.escape(described)}</desc>'
    return (
        f'<svg id="{key}" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-labelledby="{key}-title {key}-desc">{head}{body}</svg>'
    )
