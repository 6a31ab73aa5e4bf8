"""Runs that cannot start, diverge or are interrupted end with a message and a status, and say how to resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import dst
from dst.checkpoints import load_checkpoint
from dst.cli import main as cli
from dst.cli.build import build
from dst.cli.train import run
from dst.models.classifier import Classifier
from dst.report.summary import Summary
from tests.cli import runs

ROOT = Path(cli.__file__).resolve().parents[2]

QUICK = (*runs.QUICK, "trainer.max_epochs=2", "report=false")

config = partial(runs.composed, *QUICK)

REFUSED = {
    "no epochs": (["trainer.max_epochs=0"], r"trainer\.max_epochs=0: nothing would be trained"),
    "no steps": (["trainer.max_steps=0"], r"trainer\.max_steps=0: nothing would be trained"),
    "no batches": (["trainer.limit_train_batches=0"], r"trainer\.limit_train_batches=0: nothing would be trained"),
    "a rate that is no number": (["optimizer.lr=nan"], r"optimizer\.lr=nan is not finite"),
    "csr for latent weights": (
        ["sparsity=l0", "backend=csr"],
        "l0 stores latent weights and does not support backend=csr",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_train_is_refused_before_anything_is_written(what: str, tmp_path: Path) -> None:
    overrides, message = REFUSED[what]
    with pytest.raises(dst.ConfigurationError, match=message):
        run(config(*overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["l0", "str", "movement", "top_kast", "sr_ste", "rigl"])
def test_every_method_is_built_under_every_backend_that_it_has(method: str) -> None:
    assert build(config(f"sparsity={method}")).method.backend == ("masked" if method == "rigl" else "latent")


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # A shell may have told its children to ignore Ctrl-C.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from dst.cli.main import train; "
    )
    code += "sys.exit(train(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *QUICK, *overrides]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=-1, stderr=-1, text=True)


def interrupt(process: subprocess.Popen[str], checkpoint: Path, by: int) -> tuple[int, str]:
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.05)
        process.send_signal(by)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors
    finally:
        process.kill()
        process.wait()


def test_a_run_that_is_told_to_end_does_not_report_success(tmp_path: Path) -> None:
    process = start(tmp_path, "trainer.max_epochs=5000", "hydra.run.dir=run")
    status, errors = interrupt(process, tmp_path / "run" / "checkpoints" / "last.ckpt", signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    assert f"resume with: resume=last hydra.run.dir={tmp_path / 'run'}" in errors
    assert "Traceback" not in errors
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] > 0


def test_an_interrupted_sweep_says_how_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    step, checkpoint = Classifier.training_step, tmp_path / "sweep" / "0" / "checkpoints" / "last.ckpt"

    def interrupted(self: Classifier, batch: Any, index: int) -> Any:
        if checkpoint.exists():
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, index)

    monkeypatch.setattr(Classifier, "training_step", interrupted)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("DST_TRACEBACK", "0")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell, or xdist, may have it ignored
    try:
        with pytest.raises(SystemExit) as end:
            cli.train([*QUICK, "-m", "seed=0,1", "trainer.max_epochs=5000", "hydra.sweep.dir=sweep"])
    finally:
        signal.signal(signal.SIGINT, before)
    errors = capsys.readouterr().err
    assert end.value.code == 128 + signal.SIGINT
    assert "the same command and hydra.sweep.dir=sweep" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "sweep" / "1").exists()


def test_ends_of_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    (tmp_path / "file").write_text("no folder")
    assert cli.train([*QUICK, "hydra.run.dir=file/run"]) == 2
    assert "the run's folder cannot be written (Not a directory: file/run)" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "no folder"
    with pytest.raises(SystemExit) as end:
        cli.train([*QUICK, "trainer.max_epochs=1", "optimizer.lr=1e30", "hydra.run.dir=diverged"])
    assert end.value.code == 1
    assert "training has diverged: the test loss is not finite" in capsys.readouterr().err
    assert Summary.read(tmp_path / "diverged").test.loss is None


def test_help_and_files_that_are_no_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for command in ("methods", "inspect", "report", "compare"):
        assert cli.main([command, "--help"]) == 0
        assert f"usage: dst {command}" in capsys.readouterr().out
    text = tmp_path / "notes.txt"
    for content in (b"hello, world", b"", b"\x80\x02garbage"):
        text.write_bytes(content)
        assert cli.main(["inspect", str(text)]) == 2
        message = capsys.readouterr().err
        assert "it is not a file of torch.save" in message
        assert "weights_only" not in message


def test_seconds_are_those_of_all_processes_and_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    whole = run(config("trainer.max_epochs=1"), tmp_path)
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    content["callbacks"]["Spent"]["seconds"] = 1000.0
    real = checkpoint.resolve()
    torch.save(content, real)
    before = (tmp_path / "summary.json").read_bytes(), (tmp_path / "metrics.csv").read_bytes()
    again = run(config("trainer.max_epochs=1", "resume=last"), tmp_path)
    assert again == Summary.read(tmp_path)
    assert again.seconds == whole.seconds
    assert before == ((tmp_path / "summary.json").read_bytes(), (tmp_path / "metrics.csv").read_bytes())
    longer = run(config("trainer.max_epochs=2", "resume=last"), tmp_path)
    assert longer.steps == 2 * whole.steps
    assert 1000 < longer.seconds < 1100


def test_a_training_that_ends_early_says_so_in_its_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Classifier.training_step

    def stop_soon(self: Classifier, batch: Any, index: int) -> Any:
        self.trainer.should_stop = index == 20
        return step(self, batch, index)

    monkeypatch.setattr(Classifier, "training_step", stop_soon)
    summary = run(config("sparsity=static", "sparsity.sparsify_at=0.9"), tmp_path)
    assert summary.density.shortfall is not None
    assert summary.density.shortfall.startswith("ended at density 1, target 0.1")
    assert json.loads((tmp_path / "summary.json").read_text())["density"]["shortfall"] == summary.density.shortfall
