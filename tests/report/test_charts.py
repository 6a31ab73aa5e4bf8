"""Numbers to SVG."""

from __future__ import annotations

import base64
import io
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dst.report.charts import (
    HEIGHT,
    WIDTH,
    Axis,
    Line,
    Point,
    bar_chart,
    colours,
    compact,
    data_uri,
    heat_map,
    line_chart,
    pixel_map,
    point_chart,
    thin,
    ticks,
)

X, Y = Axis("steps", compact), Axis("value", compact)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 100, [0, 25, 50, 75, 100]),
        (0, 840, [0, 250, 500, 750]),
        (-3, 3, [-2, 0, 2]),
        (0.91, 0.97, [0.92, 0.94, 0.96]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == expected


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_lie_within_and_are_few(low, size):
    if low + size <= low:
        return
    found = ticks(low, low + size)
    assert 1 <= len(found) <= 5
    assert all(low - 1e-6 * size <= t <= low + size * (1 + 1e-6) for t in found if abs(low) < 1e6 * size)


def test_thinning_keeps_the_ends():
    points = [(float(i), float(i * i)) for i in range(1000)]
    found = thin(points, 50)
    assert (len(found), found[0], found[-1]) == (50, points[0], points[-1])
    assert thin(points[:50], 50) == points[:50]


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (1200, "1.2k"), (2e6, "2M"), (3e9, "3G"), (0.125, "0.125")])
def test_numbers_are_compact(value, text):
    assert compact(value) == text


def parse(svg):
    root = ElementTree.fromstring(svg)
    assert root.get("viewBox")
    assert root.find("title").text
    assert root.find("desc").text
    return root


def test_a_line_goes_through_its_points():
    root = parse(line_chart("k", "t", [Line("a", [(0, 0), (5, 10), (10, 10)])], X, Axis("v", low=0.0, high=10.0)))
    (line,) = root.findall("polyline")
    corners = [tuple(map(float, corner.split(","))) for corner in line.get("points").split()]
    (x0, y0), (x1, y1), (x2, y2) = corners
    assert x1 - x0 == x2 - x1
    assert y0 > y1 == y2  # SVG counts downwards
    assert 0 < x0 < x2 < WIDTH
    assert 0 < y1 < y0 < HEIGHT
    assert root.find("desc").text == "a: 0 first, 10 last"


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=20))
def test_everything_is_within_the_picture(points):
    root = parse(line_chart("k", "t", [Line("a", sorted(points))], X, Y, marks=[points[0][0]]))
    for line in root.findall("polyline"):
        for corner in line.get("points").split():
            x, y = map(float, corner.split(","))
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT
    for text in root.findall("text"):
        assert 0 <= float(text.get("x")) <= WIDTH
        assert 0 <= float(text.get("y")) <= HEIGHT


def test_bars_are_as_high_as_their_counts():
    root = parse(bar_chart("k", "t", 3, 2, [1, 0, 4], X, Axis("n", low=0.0, high=4.0)))
    heights = [float(bar.get("height")) for bar in root.findall("rect")]
    assert heights[1] == 0
    assert heights[2] == pytest.approx(4 * heights[0], abs=0.2)
    assert root.find("desc").text == "5 in 3 bins from 3 to 8"


def test_points_have_their_names():
    root = parse(point_chart("k", "t", [Point("near", 0.1, 0.9), Point("far & wide", 1.0, 0.9, half=0.05)], X, Y))
    names = {text.text: text for text in root.findall("text")}
    assert names["near"].get("text-anchor") == "start"
    assert names["far & wide"].get("text-anchor") == "end"
    assert len(root.findall("circle")) == 2
    assert root.find("desc").text == "near: 0.1, 0.9; far & wide: 1, 0.9 ± 0.05"
    assert len(root.findall("path[@class='whisker s0']")) == 1


def decode(uri):
    assert uri.startswith("data:image/png;base64,")
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_more_is_lighter():
    image, least, greatest = colours(np.array([[0.0, 5.0, 10.0, math.nan]]))
    assert (least, greatest) == (0, 10)
    luminance = image[0] @ [0.2126, 0.7152, 0.0722]
    assert luminance[0] < luminance[1] < luminance[2]
    assert image[0, 3].tolist() == [128] * 3
    assert (decode(data_uri(image)) == image).all()
    assert (colours(np.ones((2, 2)))[0] == [68, 1, 84]).all()


def test_a_map_of_pixels_keeps_its_proportions():
    root = parse(pixel_map("k", "t", [[0, 1, 2, 3], [4, 5, 6, 7]]))
    picture = root.findall("image")[0]
    assert float(picture.get("width")) == 2 * float(picture.get("height"))
    image = decode(picture.get("href"))
    assert image.shape == (2, 4, 3)
    assert image[1, 3].tolist() == [253, 231, 37]


def test_a_heat_map_has_a_row_for_every_line():
    lines = [Line(f"layer.{i}.with.a.rather.long.name", [(0, i), (50, i), (100, 10 * i)]) for i in range(9)]
    root = parse(heat_map("k", "t", lines, X, Y))
    image = decode(root.findall("image")[0].get("href"))
    assert image.shape == (9, 60, 3)
    assert (image[:, 0] != image[:, -1]).any(1).tolist() == [False, *[True] * 8]
    labels = [text.text for text in root.findall("text")]
    assert sum(label.startswith("…") for label in labels) == 9
    assert labels[-2:] == ["0", "80"]
