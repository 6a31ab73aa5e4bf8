"""Comparing runs: statistics by hand, and folders as runs leave them."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest
import yaml

from dst.cli import main as cli
from dst.errors import ConfigurationError, DataError
from dst.report.compare import compare, read_runs
from dst.report.statistics import interval, pareto_front, student_t95
from tests.report.parsed import Page


def make_run(folder, method="rigl", seed=0, accuracy=0.9, cost=0.2, density=0.1, config=None, **extra):
    folder.mkdir(parents=True)
    summary = {
        "sparsity": method,
        "seed": seed,
        "density": {"target": density, "realised": density, "layers": [{"name": "a"}]},
        "test": {"accuracy": accuracy, "loss": None if accuracy is None else 1 - accuracy},
        "flops": {"inference_ratio": cost, "training_ratio": 2 * cost},
        **extra,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    settings = {"seed": seed, "density": density, "optimizer": {"lr": 0.1}, "sparsity": {"_target_": method}}
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(settings | (config or {})))
    return folder


ACCURACIES = {"rigl": [0.90, 0.92, 0.94], "set": [0.88, 0.91, 0.91], "dense": [0.95, 0.96, 0.97]}
COSTS = {"rigl": 0.2, "set": 0.1, "dense": 1.0}


def sweep(root):
    for method, accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies):
            make_run(root / method / str(seed), method, seed, accuracy, COSTS[method])
    return root


def test_quantiles_are_those_of_printed_tables():
    printed = {1: 12.706205, 2: 4.302653, 5: 2.570582, 10: 2.228139, 30: 2.042272, 60: 2.000298, 1000: 1.962339}
    for degrees, quantile in printed.items():
        assert student_t95(degrees) == pytest.approx(quantile, abs=2e-6)
    with pytest.raises(ConfigurationError, match="at least one degree"):
        student_t95(0)


def test_intervals_by_hand():
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2, 3)
    assert found.half == pytest.approx(4.302653 / math.sqrt(3))
    assert interval([0.1, 0.1, 0.1]).half == 0
    assert interval([0.1, 0.1, 0.1]).mean == 0.1
    assert interval([5.0]).half is None
    assert str(interval([5.0])) == "5"
    assert not interval([5.0]).excludes_zero


def test_pareto_front_by_hand():
    points = {"a": (1, 5), "b": (2, 7), "c": (3, 7), "d": (0.5, 1), "e": (2, 6), "twin": (2, 7)}
    assert pareto_front(points) == ("d", "a", "b", "twin")
    assert pareto_front({}) == ()


def test_groups_differences_and_fronts(tmp_path):
    found = compare(read_runs([sweep(tmp_path)]))
    groups = {group.label: group for group in found.groups}
    assert set(groups) == {"rigl density=0.1", "set density=0.1", "dense"}
    accuracy = groups["rigl density=0.1"].intervals["test.accuracy"]
    assert accuracy.mean == pytest.approx(0.92)
    assert accuracy.half == pytest.approx(4.302653 * 0.02 / math.sqrt(3))
    assert found.fronts["flops.inference_ratio"] == ("set density=0.1", "rigl density=0.1", "dense")
    pairs = {(d.first.split()[0], d.second.split()[0]): d for d in found.differences}
    assert set(pairs) == {("dense", "rigl"), ("dense", "set"), ("rigl", "set")}
    paired = pairs["rigl", "set"]
    assert paired.seeds == (0, 1, 2)
    assert paired.interval.mean == pytest.approx(0.02)
    # 0.02, 0.01, 0.03: paired by seed, whatever the spread between seeds.
    assert paired.interval.half == pytest.approx(4.302653 * 0.01 / math.sqrt(3))
    assert not paired.interval.excludes_zero
    assert pairs["dense", "rigl"].interval.excludes_zero
    assert found.notes == ()


def test_baseline_and_seeds_that_are_not_shared(tmp_path):
    make_run(tmp_path / "a", "rigl", 0)
    make_run(tmp_path / "b", "rigl", 1)
    make_run(tmp_path / "c", "set", 1)
    make_run(tmp_path / "d", "set", 2)
    make_run(tmp_path / "e", "dense", 0, density=1.0)
    make_run(tmp_path / "f", "dense", 1, density=1.0)
    runs = read_runs([tmp_path])
    (only,) = compare(runs).differences
    assert {only.first, only.second} == {"rigl density=0.1", "dense"}
    (against,) = compare(runs, "dense").differences
    assert (against.first, against.second, against.seeds) == ("rigl density=0.1", "dense", (0, 1))
    with pytest.raises(ConfigurationError, match=r"baseline='x' is none of 'rigl density=0\.1'"):
        compare(runs, "x")


def test_what_varies_within_a_method_is_in_the_label_and_between_methods_in_a_note(tmp_path):
    make_run(tmp_path / "a", "rigl", config={"optimizer": {"lr": 0.1}})
    make_run(tmp_path / "b", "rigl", config={"optimizer": {"lr": 0.2}})
    make_run(tmp_path / "c", "rigl", density=0.2, config={"optimizer": {"lr": 0.2}})
    found = compare(read_runs([tmp_path]))
    assert [g.label for g in found.groups] == [
        "rigl density=0.1 optimizer.lr=0.1",
        "rigl density=0.1 optimizer.lr=0.2",
        "rigl density=0.2 optimizer.lr=0.2",
    ]
    make_run(tmp_path / "other" / "d", "set", config={"optimizer": {"lr": 0.5}, "threads": 3})
    (note,) = compare(read_runs([tmp_path / "a", tmp_path / "other"])).notes
    assert note == "the methods differ in settings that are not their own: optimizer.lr"


def test_runs_that_diverged_have_a_note(tmp_path):
    make_run(tmp_path / "a", seed=0, accuracy=None)
    make_run(tmp_path / "b", seed=1, accuracy=0.5)
    found = compare(read_runs([tmp_path]))
    assert found.groups[0].intervals["test.accuracy"].n == 1
    assert found.notes == ("rigl density=0.1: 1 of 2 runs have no finite test.accuracy",)


def test_memory_and_latency_are_costs_where_a_summary_has_them(tmp_path):
    make_run(tmp_path / "a", "rigl", accuracy=0.9, memory={"peak": 100}, latency={"seconds": 0.5})
    make_run(tmp_path / "b", "dense", accuracy=0.8, memory={"peak": 50}, latency={"seconds": 0.5})
    found = compare(read_runs([tmp_path]))
    assert found.fronts["memory.peak"] == ("dense", "rigl density=0.1")
    assert found.fronts["latency.seconds"] == ("rigl density=0.1",)


def test_files_of_every_kind(tmp_path, capsys):
    folder = sweep(tmp_path / "runs")
    make_run(folder / "odd", "<b>|x", 0, 0.5, 0.05)
    output = tmp_path / "out"
    assert cli.main(["compare", str(folder), "--output", str(output), "--baseline", "dense"]) == 0
    shown = capsys.readouterr().out
    for word in ("rigl density=0.1", "±", "dense", "zero is", "0.2 ± 0 *"):
        assert word in shown

    rows = list(csv.DictReader(io.StringIO((output / "compare.csv").read_text())))
    by_label = {row["runs"]: row for row in rows}
    assert float(by_label["dense"]["test.accuracy mean"]) == pytest.approx(0.96)
    assert by_label["dense"]["seeds"] == "0 1 2"
    assert by_label["dense"]["on front of flops.training_ratio"] == "1"
    assert by_label["<b>|x density=0.1"]["test.accuracy ci95"] == ""
    differences = list(csv.DictReader(io.StringIO((output / "differences.csv").read_text())))
    assert [row["second"] for row in differences] == ["dense", "dense"]

    markdown = (output / "compare.md").read_text()
    lines = [line.replace("\\|", "") for line in markdown.split("\n\n")[0].splitlines()]
    assert len(lines) == 2 + 4
    assert len({line.count("|") for line in lines}) == 1

    text = (output / "compare.html").read_text()
    page = Page(text)
    assert "://" not in text  # no network
    assert "<b>" not in text
    assert "prefers-color-scheme: dark" in text
    assert [tag for tag, _ in page.tags].count("svg") == 2
    assert [tag for tag, _ in page.tags].count("circle") == 2 * 4
    front = next(a for tag, a in page.tags if tag == "polyline")["points"].split()
    assert len(front) == 4
    positions = [tuple(map(float, point.split(","))) for point in front]
    assert positions == sorted(positions)  # dearer is further right
    assert [y for _, y in positions] == sorted((y for _, y in positions), reverse=True)  # and better is higher


def test_a_dense_run_counts_once_in_a_sweep_over_densities(tmp_path):
    for i, density in enumerate((0.1, 0.05)):
        make_run(tmp_path / str(i), method="dense", density=density, accuracy=0.9)
    comparison = compare(read_runs([tmp_path]))
    assert [group.label for group in comparison.groups] == ["dense"]
    assert list(comparison.groups[0].runs) == [0]


def test_bad_arguments_end_in_one_line(tmp_path, capsys):
    make_run(tmp_path / "a" / "1")
    make_run(tmp_path / "a" / "2")
    (tmp_path / "empty").mkdir()
    broken = make_run(tmp_path / "broken" / "1")
    (broken / "summary.json").write_text('{"sparsity": 1')
    unread = make_run(tmp_path / "unread" / "1")
    (unread / ".hydra" / "config.yaml").write_text("a: [")
    for argument, message in (
        ("a", "are both runs of rigl density=0.1 with seed 0: leave one out"),
        ("empty", "there is no finished run in"),
        ("broken", "is not a run's summary"),
        ("unread", "cannot be read"),
    ):
        assert cli.main(["compare", str(tmp_path / argument)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line
    assert cli.main(["compare"]) == 2
    assert "usage: dst compare" in capsys.readouterr().err
    with pytest.raises(DataError, match="no runs"):
        compare([])


def test_a_folder_given_twice_counts_once(tmp_path):
    make_run(tmp_path / "a")
    assert len(read_runs([tmp_path, tmp_path / "a"])) == 1
