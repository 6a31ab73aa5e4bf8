"""The report's structure, read by a parser of HTML."""

from __future__ import annotations

import json
import re

import pytest

from dst.cli import main as cli
from dst.errors import DataError
from dst.report import REPORT_FILE, gather, render, write_report
from dst.report.page import SECTIONS
from tests.report.parsed import Page
from tests.report.runs import HOSTILE, make_run


def page_of(folder):
    return Page(render(gather(folder)))


def test_only_a_density_that_moves_takes_a_chart(tmp_path):
    names = ["first.weight", "second.weight"]
    page = page_of(make_run(tmp_path / "constant", names))
    assert "Every layer kept its density throughout" in page.text["density"]
    assert "density-chart" not in {svg.get("id") for svg in page.all("svg")}
    folder = make_run(tmp_path / "moving", names)
    rows = [json.loads(line) for line in (folder / "topology.jsonl").read_text().splitlines()]
    rows[1]["active"] = [64, 32]
    (folder / "topology.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(folder)
    assert "throughout" not in page.text["density"]
    assert "density-chart" in {svg.get("id") for svg in page.all("svg")}


def test_all_charts_over_steps_share_one_axis(tmp_path):
    """Updates end before the training does: the curves do, and the axes do not."""
    folder = make_run(tmp_path, ["first.weight"], updates=3)
    run = gather(folder)
    assert max(step for step, _ in run.topology["churn"]) == 300
    text, marks = render(run), {}
    for name in ("accuracy", "churn", "exploration_rate", "dead-outputs"):
        chart = re.search(rf'<svg id="{name}-chart".*?</svg>', text, flags=re.S)
        assert chart
        marks[name] = [t for t in re.findall(r">([^<>]+)</text>", chart[0]) if re.fullmatch(r"\d+", t)][-3:]
    assert set(map(tuple, marks.values())) == {("0", "200", "400")}, marks  # a tick at 500 would be at the very end


@pytest.mark.parametrize("layers", [1, 3, 8, 9, 30])
def test_every_section_is_there_and_every_picture_says_what_it_shows(tmp_path, layers):
    names = [f"blocks.{i}.weight" for i in range(layers)]
    page = page_of(make_run(tmp_path, names))
    assert [section["id"] for section in page.all("section")] == list(SECTIONS)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    pictures = [svg for svg in page.all("svg") if svg.get("aria-hidden") != "true"]
    assert len(pictures) == 2 + 3 + 2 + layers + 1 + 1  # the density is constant, which takes no picture
    for svg in page.all("svg"):
        assert re.fullmatch(r"0 0 \d+ \d+", svg["viewbox"])
    for svg in pictures:
        assert svg["role"] == "img"
        assert set(svg["aria-labelledby"].split()) <= set(ids)
    for attributes in page.all("section"):
        assert attributes["aria-labelledby"] in ids
    assert all(link["href"].removeprefix("#") in ids for link in page.all("a"))
    assert {name for name in names if name not in page.text["layers"]} == set()
    # Lines can tell eight layers apart; more are rows of colours.
    assert len(page.all("image")) == (2 if layers <= 8 else 2 + 2 * 2)


def test_the_page_needs_nothing_from_outside(tmp_path):
    page = page_of(make_run(tmp_path, ["a", "b"]))
    names = {name for name, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "action", "data"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:image/png;base64,"))
        assert not [key for key in attributes if key.startswith("on")]
    text = render(gather(tmp_path))
    assert "url(" not in text
    assert "http://" not in text
    assert "https://" not in text
    assert any(meta.get("http-equiv") == "Content-Security-Policy" for meta in page.all("meta"))
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))


def test_names_are_text(tmp_path):
    page = page_of(make_run(tmp_path, [HOSTILE, "b" * 300]))
    assert not page.all("script")
    assert HOSTILE in page.text["layers"]


def test_numbers_are_those_of_the_run(tmp_path):
    page = page_of(make_run(tmp_path, ["a", "b"]))
    summary = page.text["summary"]
    for text in ("90.00%", "0.25 (target 0.25)", "64 of 256", "25.00% of dense", "100.00% of dense", "28.00% of dense"):
        assert text in summary
    assert re.search(r"seed\s+7\s", summary)
    assert "multiplies by its zeros" in page.text["flops"]
    assert "density: 0.25" in page.text["config"]
    assert "82.00%" in page.text["curves"]  # training accuracy at step 400
    assert re.search(r"rigl at density 0.25, seed 7", page.text[""])
    assert str(tmp_path) not in page.text[""]  # the page does not tell where the folder is


def test_the_note_on_flops_names_a_backend_that_skips_zeros(tmp_path):
    page = page_of(make_run(tmp_path, ["a"], executed=0.25))
    assert "skips zeros" in page.text["flops"]
    assert "100.00%" not in page.text["summary"]


def test_an_unfinished_run_has_a_report(tmp_path):
    page = page_of(make_run(tmp_path, ["a", "b"], finished=False))
    assert [section["id"] for section in page.all("section")] == list(SECTIONS)
    assert "has not ended" in page.text["summary"]
    for section in ("degrees", "input", "flops"):
        assert "Not known" in page.text[section]
    assert "0.2500" in page.text["layers"]


@pytest.mark.parametrize("kept", ["summary.json", "metrics.csv", "topology.jsonl"])
def test_any_one_file_makes_a_report(tmp_path, kept):
    make_run(tmp_path, ["a", "b"])
    for name in {"summary.json", "metrics.csv", "topology.jsonl"} - {kept}:
        (tmp_path / name).unlink()
    (tmp_path / ".hydra" / "config.yaml").unlink()
    page = page_of(tmp_path)
    assert [section["id"] for section in page.all("section")] == list(SECTIONS)
    assert "no settings" in page.text["config"]


def test_topologies_that_never_move(tmp_path):
    page = page_of(make_run(tmp_path, ["a"], updates=0))
    assert "Exploration" in page.text["topology"]
    assert "drop fraction" not in page.text["topology"]


def test_steps_of_levels_are_counted_through(tmp_path):
    rows = [{"event": "layers", "level": 0, "names": ["a"], "shapes": [[8, 16]], "weights": [128]}]
    for level, active in ((0, 128), (1, 96)):
        for step in (0, 50, 100):
            rows.append(
                {
                    "event": "epoch", "level": level, "step": step, "density": active / 128, "updates": 0,
                    "exploration_rate": 1.0, "active": [active],
                }
            )  # fmt: skip
    (tmp_path / "topology.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "metrics.csv").write_text("level,step,val/loss\n0,100,2\n1,50,1\n")
    run = gather(tmp_path)
    assert run.layers.density == [[(0, 1), (50, 1), (100, 1), (100, 0.75), (150, 0.75), (200, 0.75)]]
    assert run.metrics == {"val/loss": [(100, 2), (150, 1)]}
    assert run.levels == [100]
    assert 'class="mark"' in render(run)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("summary.json", "{", "summary.json is not a run's summary"),
        ("metrics.csv", "step,val/loss\n1,blue\n", "metrics.csv is not a table of metrics"),
        ("topology.jsonl", '{"event":"mask"}\n', "topology.jsonl is no recording of this version"),
        ("topology.jsonl", '{"no":"event"}\n', "topology.jsonl is no recording of this version"),
        (".hydra/config.yaml", "a: [", "config.yaml cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, message):
    make_run(tmp_path, ["a"])
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=re.escape(message)):
        gather(tmp_path)


def test_dst_report(tmp_path, capsys):
    run = make_run(tmp_path / "sweep" / "0", ["a"])
    assert cli.main(["report", str(run)]) == 0
    assert (run / REPORT_FILE).read_text().startswith("<!doctype html>")
    assert cli.main(["report", str(run), "--output", str(tmp_path / "new" / "r.html")]) == 0
    assert (tmp_path / "new" / "r.html").read_text() == (run / REPORT_FILE).read_text()
    assert capsys.readouterr().out.splitlines() == [str(run / REPORT_FILE), str(tmp_path / "new" / "r.html")]
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert f"error: there is no run in {tmp_path / 'none'}" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "sweep")]) == 2
    assert "it holds several: name one, or use dst compare" in capsys.readouterr().err
    assert cli.main(["report"]) == 2


def test_a_report_replaces_the_old_one_whole(tmp_path):
    run = make_run(tmp_path, ["a"])
    (run / REPORT_FILE).write_text("old")
    assert write_report(run, run / REPORT_FILE) == run / REPORT_FILE
    assert "old" not in (run / REPORT_FILE).read_text()[:10]
    assert not list(run.glob("*.part"))
