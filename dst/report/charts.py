"""Small SVG charts: pure functions from numbers to text.

Every picture scales with its place (a ``viewBox``, no width of its own), takes its colours from the page's variables, so
that dark mode is the page's business, and says in ``title`` and ``desc`` what it shows.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 360, 220
"""Size in user units: about a phone's width, so that text keeps its size there."""

MOST_LINES = 8
"""Lines that colour and dash can tell apart."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 34
_POINTS = 240
_STOPS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=float)


@dataclass(frozen=True)
class Line:
    """A named curve: (x, y) in the order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """How numbers along an axis are labelled.

    Attributes:
        label: What stands beside the axis.
        form: Turns a number into text.
        low: Least end of the axis; None takes the numbers'.
        high: Greatest end; None takes the numbers'.
    """

    label: str
    form: Callable[[float], str] = field(default=lambda value: f"{value:.4g}")
    low: float | None = None
    high: float | None = None


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within an interval, for the marks of an axis.

    Args:
        low: Its lower end.
        high: Its upper end, at least ``low``.
        most: Most marks wanted, at least 2.

    Returns:
        Multiples of 1, 2, 2.5 or 5 times a power of ten, ascending; ``low`` alone for an empty interval.
    """
    if not high > low:
        return [low]
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def thin(points: Sequence[tuple[float, float]], most: int = _POINTS) -> list[tuple[float, float]]:
    """Leave out points in even distances where there are too many; the first and the last stay."""
    if len(points) <= most:
        return list(points)
    chosen = sorted({round(i * (len(points) - 1) / (most - 1)) for i in range(most)})
    return [points[i] for i in chosen]


def compact(value: float) -> str:
    """A number in few characters: 1200 as 1.2k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def line_chart(key: str, title: str, lines: Sequence[Line], x: Axis, y: Axis, marks: Sequence[float] = ()) -> str:
    """Curves over a common axis.

    Args:
        key: Unique on the page; begins the ids.
        title: What it shows.
        lines: At most `MOST_LINES`, at least one point in all.
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


def point_chart(key: str, title: str, points: Sequence[tuple[str, float, float]], x: Axis, y: Axis) -> str:
    """Single points with their names beside them; see `line_chart`."""
    frame = _Frame([p[1] for p in points], [p[2] for p in points], x, y)
    parts = [frame.grid()]
    above = 1
    for i, (name, a, b) in enumerate(points):
        end = frame.x(a) > WIDTH / 2
        above = -above  # names of points at one height do not run into each other
        place = f'x="{frame.x(a) + (-2 if end else 2):.1f}" y="{frame.y(b) + (18 if above > 0 else -10):.1f}"'
        anchor = "end" if end else "start"
        parts.append(
            f'{_dot(frame.x(a), frame.y(b), i)}<text {place} text-anchor="{anchor}">{html.escape(name)}</text>'
        )
    described = "; ".join(f"{name}: {x.form(a)}, {y.form(b)}" for name, a, b in points)
    return _svg(key, title, described, "".join(parts))


def bar_chart(key: str, title: str, first: int, width: int, counts: Sequence[int], x: Axis, y: Axis) -> str:
    """A histogram with bins of equal width; see `line_chart`.

    Args:
        key: As there.
        title: As there.
        first: Least value of the first bin.
        width: Width of a bin.
        counts: Of each bin.
        x: The axis below.
        y: The axis on the left.
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
    """Many curves as rows of colours, for more than lines can tell apart; ``y`` forms the scale's labels.

    See `line_chart` for the arguments; rows are labelled with the lines' names.
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
    """Counts by place, as an image with the scale below; see `line_chart`."""
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
    """Map numbers to colours from dark violet (least) to yellow (greatest), lighter meaning more.

    Args:
        cells: Floats of shape (rows, columns), NaN where unknown (grey).

    Returns:
        Bytes of shape (rows, columns, 3), the least and the greatest number.
    """
    least, greatest = float(np.nanmin(cells)), float(np.nanmax(cells))
    unit = np.nan_to_num((cells - least) / ((greatest - least) or 1.0)) * (len(_STOPS) - 1)
    index = np.minimum(unit.astype(int), len(_STOPS) - 2)
    share = (unit - index)[..., None]
    image = _STOPS[index] * (1 - share) + _STOPS[index + 1] * share
    image[np.isnan(cells)] = 128
    return image.round().astype(np.uint8), least, greatest


def data_uri(image: np.ndarray) -> str:
    """An image (bytes of shape (rows, columns, 3)) as a PNG within the page."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


class _Frame:
    """Where numbers lie in a picture with two axes."""

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


def _dot(x: float, y: float, i: int) -> str:
    return f'<circle class="dot s{i}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'


def _sampled(points: Sequence[tuple[float, float]], low: float, high: float, columns: int) -> list[float]:
    """The newest value at each of ``columns`` times; NaN before the first."""
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
    """A bar of colours with its ends labelled, and the height below it."""
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
