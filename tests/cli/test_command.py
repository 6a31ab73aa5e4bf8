"""The command line, in its own folder; in a subprocess where streams and imports matter."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from joblib.externals.loky import get_reusable_executor

import dst
from dst.cli import main as cli
from dst.cli.catalogue import cost
from dst.init import Snip
from dst.metrics.energy import available_meters
from dst.scores import Momentum

ROOT = Path(cli.__file__).resolve().parents[2]
QUICK = ("trainer.max_epochs=2", "trainer.enable_progress_bar=false")


RUN = "from dst.cli.main import train; sys.exit(train(sys.argv[1:]))"  # where there is no checkout
if (ROOT / "train.py").exists():
    RUN = f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
AFTER = "----- the next command"
SEVERAL = f"""
import pathlib, runpy, sys
*first, last = [part.splitlines() for part in sys.argv[1:]]
for arguments in first:
    sys.argv = ["train.py", *arguments]
    try:
        {RUN}
    except SystemExit as end:
        print(end.code, *pathlib.Path().iterdir(), "{AFTER}", sep=chr(10), file=sys.stderr, flush=True)
sys.argv = ["train.py", *last]
{RUN}
"""


def train(folder, *commands):
    """Run commands one after another in one process that nothing has touched; what precedes the last says how it ended."""
    environment = {k: v for k, v in os.environ.items() if k not in ("DST_TRACEBACK", "HYDRA_FULL_ERROR")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SEVERAL, *("\n".join(arguments) for arguments in commands)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


class Here:
    """Calls the command in this process; it has what ``subprocess.run`` would return."""

    def __init__(self, monkeypatch, capsys):
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, folder, *arguments):
        with self._monkeypatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "argv", ["train.py"])
            patch.setenv("DST_TRACEBACK", "0")
            patch.setenv("HYDRA_FULL_ERROR", "0")
            self._capsys.readouterr()
            try:
                status = cli.train(arguments)
            except SystemExit as end:
                status = end.code
        return subprocess.CompletedProcess(arguments, status, *self._capsys.readouterr())


@pytest.fixture
def train_here(monkeypatch, capsys):
    """``train`` in this process."""
    threads = torch.get_num_threads()
    yield Here(monkeypatch, capsys)
    torch.set_num_threads(threads)


def check_schema(summary):
    assert list(summary) == [
        "sparsity", "seed", "steps", "seconds", "density", "test", "flops", "topology",
        "memory", "latency", "energy",
    ]  # fmt: skip
    assert list(summary["density"]) == ["target", "realised", "layers", "shortfall"]
    assert list(summary["test"]) == ["accuracy", "loss", "weights", "step"]
    assert (summary["test"]["weights"], summary["test"]["step"]) == ("last", summary["steps"])
    assert list(summary["flops"]) == [
        "inference_ratio",
        "training_ratio",
        "executed_ratio",
        "training_executed_ratio",
        "dense_inference",
        "convention",
        "uncounted",
    ]
    assert (summary["flops"]["convention"], summary["flops"]["uncounted"]) == ("flops", [])
    assert list(summary["memory"]) == ["predicted_mib", "peak_mib", "source", "parts", "conditions"]
    assert list(summary["memory"]["parts"]) == [
        "weights", "topology", "gradients", "optimizer_state", "activations"
    ]  # fmt: skip
    assert list(summary["latency"]) == ["one_ms", "batch_ms", "conditions"]
    if available_meters():
        assert list(summary["energy"]) == ["training_joules", "step_joules", "inference_joules", "source"]
    else:
        assert summary["energy"] is None
    assert summary["flops"]["executed_ratio"] == 1  # the masked backend multiplies by its zeros
    assert list(summary["topology"]) == ["updates", "exploration_rate"]
    for layer in summary["density"]["layers"]:
        assert list(layer) == ["name", "shape", "weights", "nonzero", "density"]


def test_the_main_job_leaves_a_complete_folder(tmp_path):
    arguments, message = REFUSED["a density out of range"]
    done = train(tmp_path, arguments, ["sparsity=rigl", "density=0.1", "trainer.max_epochs=10"])
    assert done.returncode == 0, done.stderr
    # A mistake is one line, as the first thing that the process says too, and leaves no file.
    refused, _, errors = done.stderr.partition(f"{AFTER}\n")
    line, status = refused.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert status == "2"
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

    assert "rigl: 100%" in errors  # the progress bar
    assert f"{100 * test:.2f}%" in done.stdout
    assert all(layer["name"] in done.stdout for layer in layers)
    assert "Traceback" not in errors


REFUSED = {
    "a typo in a group": (["sparsity=rgil"], "no sparsity=rgil; did you mean rigl?"),
    "a density that is no number": (["density=abc"], "'abc'"),
    "a density out of range": (["density=1.5"], "density=1.5 must lie in (0, 1]"),
    "missing data": (["data=mnist", "data.download=false", "data.root=nowhere"], "nowhere/mnist"),
    "an infeasible budget": (["sparsity=static", "density=1e-6"], "density=1e-06 keeps 1 weights for 3 layers"),
    "a sweep over a typo": (["-m", "sparsity=rigl,rgil"], "no sparsity=rgil; did you mean rigl?"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_gives_one_message_and_leaves_nothing(mistake, tmp_path, train_here):
    arguments, message = REFUSED[mistake]
    done = train_here(tmp_path, *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_sweep_ends_with_a_table_of_all_runs_and_reports_the_one_that_failed(tmp_path, train_here):
    # Overrides before and after the flag, and a run that fails before others that do not.
    done = train_here(tmp_path, "density=1.5,0.2", "-m", "sparsity=dense,set", *QUICK)
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


# Each process of joblib's imports everything anew, so by default one alone gets a run.
@pytest.mark.parametrize("seeds", ["1", pytest.param("0,1", marks=pytest.mark.exhaustive)])
def test_the_joblib_launcher_sweeps_too(tmp_path, train_here, seeds):
    try:
        done = train_here(
            tmp_path, "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"seed={seeds}", "report=false", *QUICK
        )
    finally:
        get_reusable_executor().shutdown(wait=True, kill_workers=True)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("multirun/*/*")
    with (folder / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["status"] for r in rows] == ["ok"] * len(seeds.split(","))
    for row, seed in zip(rows, seeds.split(","), strict=True):
        summary = json.loads((folder / row["run"] / "summary.json").read_text())
        assert summary["seed"] == int(seed)
        assert summary["test"]["accuracy"] == float(row["accuracy"])
    assert len({(r["accuracy"], r["loss"]) for r in rows}) == len(rows)


def test_an_unknown_command_is_refused(capsys):
    assert cli.main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
    assert cli.main(["methods", "x"]) == 2
    assert cli.main([]) == cli.main(["--help"]) == 0
    assert "dst train" in capsys.readouterr().out


def test_methods_are_listed_with_what_they_are(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["methods"]) == 0
    header, *lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert header.split("  ")[0] == "sparsity="
    rows = {line.split()[0]: re.split(r"\s{2,}", line)[1:] for line in lines}
    assert sorted(rows) == sorted(name.rstrip("_") for name in dst.methods.__all__)
    assert rows["rigl"] == ["masked, csr", "gradient", "unstructured", "every ΔT", "arXiv:1911.11134"]
    assert rows["set"] == ["masked, csr", "random", "unstructured", "never", "arXiv:1707.04780"]
    assert rows["srigl"] == ["masked", "gradient", "fan in", "every ΔT", "arXiv:2305.02299"]
    assert rows["static"][:4] == ["masked", "none", "unstructured", "until the mask"]
    assert rows["dense"][:4] == ["masked, csr", "none", "unstructured", "always"]
    assert rows["cht"][:4] == ["masked", "CH3L3", "unstructured", "never"]
    for name, row in rows.items():
        assert len(row) == 5 or name in ("dense", "small_dense")  # all others have a paper


def test_what_a_step_of_a_method_costs():
    assert cost(dst.methods.static(0.1, init=Snip())) == "first step"
    assert cost(dst.methods.rigl(0.1, grow=Momentum())) == "always"
    assert cost(dst.methods.sparse_from_scratch(0.1)) == "never"
    assert cost(dst.methods.lottery_ticket_rewind(0.1)) == "until the mask"
