"""Which weights of a run are tested."""

from __future__ import annotations

import csv
from functools import partial

import pytest
import torch

from dst.cli.build import build
from dst.cli.train import run
from dst.lightning import best_checkpoint as selection
from dst.models.classifier import Classifier
from dst.report.summary import Summary
from tests.cli.runs import composed

config = partial(composed, "trainer.max_epochs=4", "report=false", "select=validation")


@pytest.fixture
def worse_from(monkeypatch):
    """Let training climb the loss from an epoch on, or not move at factor 0, and end at a call if it is asked to."""
    original = Classifier.training_step

    def spoil(epoch, end=None, factor=-0.1):
        calls = iter(range(10**6))

        def training_step(self, batch, index):
            if next(calls) == end:
                raise KeyboardInterrupt
            loss = original(self, batch, index)
            return factor * loss if self.current_epoch >= epoch else loss

        monkeypatch.setattr(Classifier, "training_step", training_step)

    return spoil


def validations(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["val/accuracy"]) for row in csv.DictReader(file) if row["val/accuracy"]}


@pytest.mark.parametrize("backend", ["masked", "csr"])
def test_the_best_validation_is_tested_and_never_the_best_test(tmp_path, worse_from, backend):
    settings = [f"backend={backend}", "sparsity.update_every=20"]
    worse_from(2)
    summary = run(config(*settings), tmp_path)
    found = validations(tmp_path)
    assert list(found) == [40, 80, 120, 160]
    assert max(found, key=found.get) == summary.test.step == 80
    assert (summary.test.weights, summary.steps) == ("validation", 160)
    assert Summary.read(tmp_path) == summary
    # The same weights again, by hand.
    parts = build(config("density=1"))
    state = torch.load(tmp_path / "checkpoints" / "best" / "best.ckpt", weights_only=True)["state_dict"]
    parts.datamodule.setup("test")
    if backend == "masked":
        parts.module.load_state_dict(state)
        parts.module.eval()
        with torch.no_grad():
            hits = [(parts.module(x).argmax(1) == y).float().mean() for x, y in parts.datamodule.test_dataloader()]
        assert summary.test.accuracy == pytest.approx(float(torch.stack(hits).mean()))
        for layer in summary.density.layers:
            assert layer["nonzero"] >= int(state[layer["name"]].count_nonzero()) > 0.9 * layer["nonzero"]
    with (tmp_path / "metrics.csv").open(newline="") as file:
        tested = [float(row["test/accuracy"]) for row in csv.DictReader(file) if row["test/accuracy"]]
    assert tested == [summary.test.accuracy]  # the test split was looked at once


def test_an_interrupted_run_selects_what_the_whole_one_does(tmp_path, worse_from):
    worse_from(2)
    whole = run(config(), tmp_path / "whole")
    worse_from(2, end=3 * 40 + 10)
    with pytest.raises(BaseException):  # noqa: B017, PT011 (Lightning turns an interruption into an exit)
        run(config(), tmp_path / "cut")
    assert not (tmp_path / "cut" / "summary.json").exists()
    worse_from(2)
    resumed = run(config("resume=last"), tmp_path / "cut")
    assert resumed.test == whole.test
    assert resumed.test.step == 80
    assert resumed.density == whole.density


def test_weights_denser_than_asked_for_are_not_selected(tmp_path, worse_from):
    worse_from(1, factor=0)  # what pruning takes away is not learned again
    summary = run(config("sparsity=gmp", "sparsity.stop=0.6"), tmp_path)
    found = validations(tmp_path)
    assert summary.density.realised == pytest.approx(0.1, abs=1e-3)
    assert summary.test.step >= 0.6 * 160
    assert max(found.values()) > found[summary.test.step]  # those of the first epoch, when it was denser


def test_without_a_validation_at_the_density_the_last_weights_are_tested(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(selection, "_TOLERANCE", -0.5)
    summary = run(config("trainer.max_epochs=1"), tmp_path)
    assert (summary.test.weights, summary.test.step) == ("last", 40)
    assert "the last weights are tested" in caplog.text
