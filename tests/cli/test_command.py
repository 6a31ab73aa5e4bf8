"""The command line as a user meets it: from a subprocess, in a folder of its own."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dst import cli

ROOT = Path(cli.__file__).resolve().parents[1]
QUICK = ("trainer.max_epochs=2", "trainer.enable_progress_bar=false")


def train(folder, *arguments):
    environment = {k: v for k, v in os.environ.items() if k not in ("DST_TRACEBACK", "HYDRA_FULL_ERROR")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "import sys; from dst.cli import train; sys.exit(train(sys.argv[1:]))"]
    if (ROOT / "train.py").exists():
        command = [sys.executable, str(ROOT / "train.py")]
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )


def check_schema(summary):
    assert list(summary) == [
        "sparsity", "seed", "steps", "seconds", "density", "test", "flops", "topology"
    ]  # fmt: skip
    assert list(summary["density"]) == ["target", "realised", "layers"]
    assert list(summary["test"]) == ["accuracy", "loss"]
    assert list(summary["flops"]) == ["inference_ratio", "training_ratio", "executed_ratio"]
    assert summary["flops"]["executed_ratio"] == 1  # the masked backend multiplies by its zeros
    assert list(summary["topology"]) == ["updates", "exploration_rate"]
    for layer in summary["density"]["layers"]:
        assert list(layer) == ["name", "shape", "weights", "nonzero", "density"]


def test_the_main_job_leaves_a_complete_folder(tmp_path):
    done = train(tmp_path, "sparsity=rigl", "density=0.1", "trainer.max_epochs=10")
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("outputs/*/*")
    assert {p.name for p in folder.iterdir()} == {
        ".hydra", "checkpoints", "metrics.csv", "report.html", "summary.json", "topology.jsonl", "train.log"
    }  # fmt: skip
    assert {p.name for p in (folder / ".hydra").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert len(kept) == 3  # the last two, and a link to the last
    assert kept[0] == "last.ckpt"

    summary = json.loads((folder / "summary.json").read_text())
    check_schema(summary)
    layers = summary["density"]["layers"]
    weights, nonzero = (sum(layer[key] for layer in layers) for key in ("weights", "nonzero"))
    assert summary["density"]["target"] == 0.1
    assert summary["density"]["realised"] == nonzero / weights
    assert abs(nonzero - 0.1 * weights) <= len(layers)
    assert summary["steps"] == 10 * 40
    assert summary["topology"]["updates"] == 3
    assert 0.1 < summary["topology"]["exploration_rate"] < 1
    assert summary["test"]["accuracy"] > 0.9
    assert summary["flops"]["inference_ratio"] < summary["flops"]["training_ratio"] < 0.11

    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 10
    assert [int(row["step"]) for row in rows if row["val/accuracy"]] == list(range(40, 401, 40))
    (test,) = [float(row["test/accuracy"]) for row in rows if row["test/accuracy"]]
    assert test == summary["test"]["accuracy"]
    assert {row["topology/updates"] for row in rows} >= {"0.0", "1.0", "2.0", "3.0"}

    assert "rigl: 100%" in done.stderr  # the progress bar
    assert f"{100 * test:.2f}%" in done.stdout
    assert all(layer["name"] in done.stdout for layer in layers)
    assert "Traceback" not in done.stderr


REFUSED = {
    "a typo in a group": (["sparsity=rgil"], "no sparsity=rgil; did you mean rigl?"),
    "a density that is no number": (["density=abc"], "'abc'"),
    "a density out of range": (["density=1.5"], "density=1.5 must lie in (0, 1]"),
    "missing data": (["data=mnist", "data.download=false", "data.root=nowhere"], "nowhere/mnist"),
    "an infeasible budget": (["sparsity=static", "density=1e-6"], "density=1e-06 keeps 1 weights for 3 layers"),
    "a sweep over a typo": (["-m", "sparsity=rigl,rgil"], "no sparsity=rgil; did you mean rigl?"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_gives_one_message_and_leaves_nothing(mistake, tmp_path):
    arguments, message = REFUSED[mistake]
    done = train(tmp_path, *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_sweep_ends_with_a_table_of_all_runs_and_reports_the_one_that_failed(tmp_path):
    # Overrides before and after the flag, and a run that fails before others that do not.
    done = train(tmp_path, "density=1.5,0.2", "-m", "sparsity=dense,set", *QUICK)
    assert done.returncode == 1
    (folder,) = tmp_path.glob("multirun/*/*")
    with (folder / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["run"], r["density"], r["sparsity"]) for r in rows] == [
        ("0", "1.5", "dense"), ("1", "1.5", "set"), ("2", "0.2", "dense"), ("3", "0.2", "set")
    ]  # fmt: skip
    assert [r["status"][:6] for r in rows] == ["failed", "failed", "ok", "ok"]
    assert [r["realised_density"][:4] for r in rows] == ["", "", "1.0", "0.2"]
    for row in rows[2:]:
        summary = json.loads((folder / row["run"] / "summary.json").read_text())
        assert float(row["accuracy"]) == summary["test"]["accuracy"]
        assert float(row["training_ratio"]) == summary["flops"]["training_ratio"]
    for row in rows[:2]:
        kept = {p.name for p in (folder / row["run"]).iterdir()}
        assert kept == {".hydra", "train.log", "error.txt"}
        assert "density=1.5" in (folder / row["run"] / "error.txt").read_text()
    table = (folder / "sweep.md").read_text().splitlines()
    assert len(table) == 2 + 4
    assert table[0].startswith("| run | density | sparsity | realised density | test accuracy |")
    assert all(word in done.stdout for word in ("test accuracy", "failed: density=1.5"))
    assert "Traceback" not in done.stderr


def test_the_joblib_launcher_sweeps_too(tmp_path):
    done = train(tmp_path, "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1", *QUICK)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("multirun/*/*")
    with (folder / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["seed"], r["status"]) for r in rows] == [("0", "ok"), ("1", "ok")]
    assert rows[0]["accuracy"] != rows[1]["accuracy"] or rows[0]["loss"] != rows[1]["loss"]


def test_an_unknown_command_is_refused(capsys):
    assert cli.main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
    assert cli.main(["methods", "x"]) == 2
    assert cli.main([]) == cli.main(["--help"]) == 0
    assert "dst train" in capsys.readouterr().out


def test_methods_are_listed_with_their_settings(capsys):
    assert cli.main(["methods"]) == 0
    shown = capsys.readouterr().out
    for word in ("rigl", "set ", "lottery_ticket_rewind", "update_every", "Evci"):
        assert word in shown
