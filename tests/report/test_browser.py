"""The report in a real browser, at the sizes of a phone and a desktop, light and dark. No test compares pixels."""

from __future__ import annotations

import base64
from itertools import pairwise

import pytest

from dst.report import write_report
from dst.report.compare import compare, read_runs
from dst.report.comparison_output import write_comparison
from dst.report.page import SECTIONS
from tests.report.browser import NAMES, Browser, find_browser
from tests.report.runs import HOSTILE, make_run
from tests.report.test_compare import sweep
from tests.sampling import rotated

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason=f"no browser: install one of {', '.join(NAMES)} (Debian: chromium-headless-shell)"
)

BOXES = """
[...document.querySelectorAll("section, section h2, figure > svg, dl div, pre, table")].filter(
  e => !e.closest("details:not([open])")).map(e => {
    const b = e.getBoundingClientRect();
    return {tag: e.tagName, id: e.id, left: b.left, right: b.right, top: b.top + scrollY, width: b.width, height: b.height};
})"""

# Relative luminance and contrast as WCAG 2 defines them, of every element that has text of its own.
CONTRAST = """
(() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = parse(c).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor; if ((parse(c)[3] ?? 1) > 0) return c; } };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || e.closest("title, desc")) continue;
    const style = getComputedStyle(e), ink = e instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), e.tagName, e.textContent.slice(0, 30)]);
  }
  for (const e of document.querySelectorAll(".line, .bar, .dot")) {
    const style = getComputedStyle(e), ink = e.matches(".line") ? style.stroke : style.fill;
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
    found.push([1.5 * (a + 0.05) / (b + 0.05), e.tagName, e.getAttribute("class")]);
  }
  return found;
})()"""

# How many colours a screenshot has in each box, and whether the rest of the page is one.
COLOURS = """
(async () => {
  const image = new Image(); image.src = "data:image/png;base64,%s"; await image.decode();
  const canvas = new OffscreenCanvas(image.width, image.height), context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return {width: image.width, height: image.height, colours: %s.map(b => {
    const data = context.getImageData(b.left, b.top, Math.max(1, b.width), Math.max(1, b.height)).data;
    return new Set(new Uint32Array(data.buffer)).size;
  })};
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(find_browser(), tmp_path_factory.mktemp("profile")) as found:
        yield found


PAGES = ["few layers", "many layers", "unfinished"]
SIZES = {"small": (320, 640), "phone": (390, 844), "desk": (1280, 800)}


@pytest.fixture(scope="module")
def page(request, tmp_path_factory):
    names = {
        "few layers": ["model.hidden.0.weight", HOSTILE],
        "many layers": [f"backbone.stage{i // 6}.block{i}.convolution_with_a_very_long_name.weight" for i in range(24)],
        "unfinished": ["model.weight"],
    }[request.param]
    run = make_run(tmp_path_factory.mktemp("run"), names, finished=request.param != "unfinished")
    return write_report(run, run / "report.html")


@pytest.mark.parametrize(("page", "theme", "size"), rotated(PAGES, ["light", "dark"], SIZES, each=2), indirect=["page"])
def test_the_page_fits_and_can_be_read(browser, page, theme, size):
    (width, height), dark = SIZES[size], theme == "dark"
    browser.open(page.as_uri(), width, height, dark)
    requested = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in requested if not url.startswith("data:")] == [page.as_uri()]
    assert not [e["params"] for e in browser.events if e["method"] == "Log.entryAdded"]
    for opened in (False, True):
        if opened:
            browser.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
        scrolled, room = browser.evaluate(
            "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert scrolled <= room  # nothing sticks out to the side
    browser.evaluate("document.querySelectorAll('details').forEach(e => e.open = false)")

    boxes = browser.evaluate(BOXES)
    assert [box["id"] for box in boxes if box["tag"] == "SECTION"] == list(SECTIONS)
    for box in boxes:
        assert box["width"] > 50, box
        assert box["height"] > 5, box
        assert box["left"] >= 0, box
        assert box["right"] <= width, box
    sections = [box for box in boxes if box["tag"] == "SECTION"]
    assert all(a["top"] + a["height"] <= b["top"] for a, b in pairwise(sections))
    if width < 600:
        # Text within pictures keeps a readable size.
        sizes = browser.evaluate("[...document.querySelectorAll('figure > svg')].map(e => 11 * e.getScreenCTM().a)")
        assert all(size >= 8.5 for size in sizes)

    poor = [entry for entry in browser.evaluate(CONTRAST) if entry[0] < 4.5]
    assert poor == []
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 20, 20)" if dark else "rgb(255, 255, 255)")

    seen = browser.evaluate("document.documentElement.scrollHeight")
    picture = base64.b64encode(browser.screenshot()).decode()
    browser.open("about:blank", width, height, dark)
    drawn = browser.evaluate(COLOURS % (picture, str(boxes).replace("'", '"')))
    assert (drawn["width"], drawn["height"]) == (width, seen) or drawn["height"] >= seen
    blank = [box for box, count in zip(boxes, drawn["colours"], strict=True) if count < 3]
    assert blank == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(320, 640), (1280, 800)], ids=["small", "desk"])
def test_the_comparison_fits_and_can_be_read(browser, tmp_path, width, height, dark):
    (path,) = [f for f in write_comparison(compare(read_runs([sweep(tmp_path)])), tmp_path) if f.suffix == ".html"]
    browser.open(path.as_uri(), width, height, dark)
    requested = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert requested == [path.as_uri()]
    assert not [e["params"] for e in browser.events if e["method"] == "Log.entryAdded"]
    scrolled, room = browser.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert scrolled <= room
    assert [entry for entry in browser.evaluate(CONTRAST) if entry[0] < 4.5] == []
    assert browser.evaluate("document.querySelectorAll('figure > svg').length") == 2


def test_numbers_open_by_keyboard(browser, tmp_path):
    run = make_run(tmp_path, ["a", "b"])
    browser.open(write_report(run, run / "report.html").as_uri(), 390, 844, False)
    browser.evaluate("document.querySelector('#curves summary').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r" * (kind == "keyDown"))
    assert browser.evaluate("document.querySelector('#curves details').open") is True
    assert browser.evaluate("document.querySelector('#curves table').rows.length") == 6
