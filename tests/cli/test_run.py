"""``dst.cli.train.run`` in this process: resuming, errors, and the contents of run folders."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dst.backends import timing
from dst.cli import main as cli
from dst.cli import sweep
from dst.cli.train import run
from dst.data import Digits
from dst.errors import ConfigurationError, DataError, StateError
from dst.lightning.recorder import read_rows
from dst.metrics import energy
from dst.models.classifier import Classifier, cosine, step
from dst.report.summary import Density, Flops, Quality, Summary, Topology
from tests.cli.runs import composed, metrics, without_time
from tests.metrics.counter import Counter

SMALL = ["model=mlp", "model.width=32", "model.depth=2", "report=false"]

config = partial(composed, "trainer.max_epochs=4")


def test_a_run_that_measures_resumes_with_the_layers_it_has(tmp_path, monkeypatch, capsys):
    def pretend(fast):
        monkeypatch.setattr(timing, "measure", lambda case: timing.Timing(2.0 if case.inputs == fast else 0.5, 1.0))

    pretend(64)
    run(config("backend=auto", "trainer.max_epochs=2"), tmp_path / "whole")
    assert "model.hidden.0.weight csr (2 × masked speed, measured on 32 rows)" in capsys.readouterr().err
    run(config("backend=auto", "trainer.max_epochs=1"), tmp_path / "parts")
    pretend(300)
    run(config("backend=auto", "trainer.max_epochs=2", "resume=last"), tmp_path / "parts")
    assert "model.hidden.0.weight csr (as in the checkpoint)" in capsys.readouterr().err
    whole, parts = (
        torch.load(tmp_path / f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for f in ("whole", "parts")
    )
    assert {name for name in whole if name.endswith("values")} == {"model.hidden.0.values"}
    assert whole.keys() == parts.keys()


class PowerCut(Exception):
    """Stands for any end of a process."""


def cut_power(monkeypatch, at_call):
    calls = iter(range(at_call + 1))
    original = Classifier.training_step

    def training_step(self, batch, index):
        if next(calls) == at_call:
            raise PowerCut
        return original(self, batch, index)

    monkeypatch.setattr(Classifier, "training_step", training_step)


@pytest.mark.parametrize(
    ("method", "at_call"),
    [("rigl", 100), ("lottery_ticket_rewind", 300)],  # the third epoch; the third epoch of the second level
)
def test_an_interrupted_run_resumes_as_if_it_had_not_been(tmp_path, monkeypatch, method, at_call):
    settings = [*SMALL, f"sparsity={method}", "density=0.8"]
    if method == "rigl":
        settings.append("sparsity.update_every=30")
    else:
        settings.append("sparsity.rewind_to=0.1")
    whole = run(config(*settings), tmp_path / "whole")
    with monkeypatch.context() as patch:
        cut_power(patch, at_call)
        with pytest.raises(PowerCut):
            run(config(*settings), tmp_path / "cut")
    assert not (tmp_path / "cut" / "summary.json").exists()
    resumed = run(config(*settings, "resume=last"), tmp_path / "cut")
    assert without_time(resumed) == without_time(whole)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert Summary.read(tmp_path / "cut") == resumed


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_is_used_when_asked(tmp_path, monkeypatch):
    settings = [*SMALL, "sparsity=rigl", "density=0.5", "sparsity.update_every=30"]
    whole = run(config(*settings), tmp_path / "whole")
    with monkeypatch.context() as patch:
        cut_power(patch, 100)
        with pytest.raises(PowerCut):
            run(config(*settings), tmp_path / "cut")
    last = (tmp_path / "cut" / "checkpoints" / "last.ckpt").resolve()
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.raises(ConfigurationError, match=r"last.ckpt cannot be read.*resume=previous"):
        run(config(*settings, "resume=last"), tmp_path / "cut")
    resumed = run(config(*settings, "resume=previous"), tmp_path / "cut")
    assert without_time(resumed) == without_time(whole)
    for path in (tmp_path / "cut" / "checkpoints").glob("*.ckpt"):
        path.write_bytes(b"")
    with pytest.raises(ConfigurationError, match="no readable checkpoint"):
        run(config(*settings, "resume=previous"), tmp_path / "cut")


def test_a_repeated_sweep_keeps_what_is_finished_and_goes_on_with_what_is_not(tmp_path, monkeypatch, capsys):
    settings = [*SMALL, "sparsity=rigl", "density=0.5", "sparsity.update_every=30"]
    whole = run(config(*settings, "seed=1"), tmp_path / "whole")
    finished, cut = tmp_path / "0", tmp_path / "1"
    for folder in (finished, cut):
        folder.mkdir()
    accuracy = cli._sweep_job(config(*settings, "seed=0"), finished)
    with monkeypatch.context() as patch:
        cut_power(patch, 100)
        cli._sweep_job(config(*settings, "seed=1"), cut)
    assert "PowerCut" in (cut / "error.txt").read_text()
    assert not (cut / "finished.yaml").exists()
    capsys.readouterr()
    # The same command again: nothing is trained in the first folder, and two of four epochs in the second.
    with monkeypatch.context() as patch:
        cut_power(patch, 2 * 44)
        assert cli._sweep_job(config(*settings, "seed=0"), finished) == accuracy
        assert cli._sweep_job(config(*settings, "seed=1"), cut) == whole.test.accuracy
    assert "finished before" in capsys.readouterr().out
    assert without_time(Summary.read(cut)) == without_time(whole)
    assert not (cut / "error.txt").exists()
    # Another command in the same folder is an error of that run, and its results stay.
    kept = (finished / "summary.json").read_bytes()
    cli._sweep_job(config(*settings, "seed=3"), finished)
    assert "other settings" in (finished / "error.txt").read_text()
    assert (finished / "summary.json").read_bytes() == kept


class PlainDigits(Digits):
    """Digits from a loader without a state, as users' data modules have."""

    def train_dataloader(self):
        images, labels = self._split("train")
        return DataLoader(TensorDataset(images / 16, labels), batch_size=32, drop_last=True)


def test_metrics_stay_whole_where_lightning_ends_an_epoch_twice(tmp_path, monkeypatch):
    settings = [*SMALL, f"data._target_={__name__}.PlainDigits", "trainer.max_steps=176"]
    with monkeypatch.context() as patch:
        cut_power(patch, 100)
        with pytest.raises(PowerCut):
            run(config(*settings), tmp_path)
    run(config(*settings, "resume=last"), tmp_path)
    rows = [row for row in metrics(tmp_path) if "train/loss" in row]
    assert all(int(row["step"]) % 44 == 0 for row in rows)
    assert "nan" not in {row["train/loss"] for row in rows}
    epochs = [row["step"] for row in read_rows(tmp_path / "topology.jsonl") if row["event"] == "epoch"]
    assert epochs == [44, 88, 132]  # the fourth epoch was the one ended twice


def test_lottery_levels_share_one_metrics_file(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "available_meters", lambda device: [Counter()])
    summary = run(config("sparsity=lottery_ticket_rewind", "density=0.7"), tmp_path)
    rows = metrics(tmp_path)
    assert sorted({row["level"] for row in rows}) == ["0", "1", "2"]
    assert all(sum("train/loss" in r for r in rows if r["level"] == n) == 4 for n in "012")
    assert summary.topology == Topology(2, pytest.approx(0.8, abs=1e-4))
    assert summary.density.realised == pytest.approx(0.7, abs=1e-4)
    levels = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("checkpoints/level_*/level.json"))]
    # Every round is paid for: densities 1, 0.8 and 0.7, and dense passes executed in each.
    assert summary.flops.training_executed_ratio == pytest.approx(summary.steps / levels[0]["steps"])
    assert summary.flops.training_executed_ratio > 2
    assert summary.energy.training_joules >= 3  # every level's
    assert summary.energy.training_joules == pytest.approx(summary.energy.step_joules * summary.steps)
    assert summary.memory.peak_mib > 0
    # One dense training, then two sparse ones whose layers cost what they keep.
    assert 1 + 0.6 + 0.5 < summary.flops.training_ratio < 1 + 0.8 + 0.8


def test_density_may_be_one_and_validation_none(tmp_path):
    summary = run(config("sparsity=set", "density=1", "data.validation=0", "trainer.max_epochs=1"), tmp_path)
    assert (summary.density.realised, summary.flops.inference_ratio) == (1, 1)
    assert summary.steps == 44


def test_layers_can_be_left_dense(tmp_path):
    summary = run(config("exclude=[model.classifier*]", "trainer.max_epochs=1"), tmp_path)
    names = [layer["name"] for layer in summary.density.layers]
    assert names == ["model.hidden.0.weight", "model.hidden.1.weight"]
    # The classifier's 1000 of 50,200 multiplications stay.
    assert summary.flops.inference_ratio == pytest.approx((0.1 * 49_200 + 1000) / 50_200, abs=1e-4)


def test_a_report_is_made_unless_it_is_not_wanted(tmp_path):
    run(config("trainer.max_epochs=1"), tmp_path / "with")
    assert "rigl at density 0.1, seed 0" in (tmp_path / "with" / "report.html").read_text()
    run(config("trainer.max_epochs=1", "report=false"), tmp_path / "without")
    assert not (tmp_path / "without" / "report.html").exists()
    assert (tmp_path / "without" / "topology.jsonl").exists()


def test_a_run_does_not_fail_for_its_report(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("dst.cli.results.write_report", fail)
    summary = run(config("trainer.max_epochs=1"), tmp_path)
    assert Summary.read(tmp_path) == summary
    assert "there is no report.html: OSError: no space left" in caplog.text


def test_the_summary_is_the_last_row_of_the_metrics(tmp_path):
    summary = run(config("trainer.max_epochs=1", "effective_density=true"), tmp_path)
    row = metrics(tmp_path)[-1]
    assert float(row["summary/test.accuracy"]) == summary.test.accuracy
    assert float(row["summary/flops.executed_ratio"]) == 1
    assert row["summary/seed"] == "0.0"
    effective = [row for row in metrics(tmp_path) if "layers/effective_density/model.classifier.weight" in row]
    assert len(effective) == 1


@pytest.mark.parametrize("logger", ["wandb", "tensorboard"])
def test_metrics_are_written_beside_another_logger(tmp_path, logger, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    found = {"wandb": "wandb/offline-run-*", "tensorboard": "tensorboard/events*"}[logger]
    for name in ("first", "second"):  # in one process, as in a sweep
        run(config(*SMALL, f"logger={logger}", "trainer.max_epochs=1"), tmp_path / name)
        assert metrics(tmp_path / name)
        assert list((tmp_path / name).glob(found))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["density=0"], r"density=0.0 must lie in \(0, 1\]"),
        (["density=nan"], "density=nan"),
        (["sparsity=dense", "density=2"], "density=2.0"),
        (["seed=-1"], "seed=-1"),
        (["threads=0"], "threads=0"),
        (["convention=mine"], "convention='mine' is unknown"),
        (["select=test"], "select=test is unknown; choose from last, validation"),
        (["select=validation", "data.validation=0"], "data.validation=0.1"),
        (["select=validation", "trainer.limit_val_batches=0"], "limit_val_batches"),
        (["select=validation", "sparsity=lottery_ticket_rewind"], "use select=last"),
        (["backend=paper"], "backend='paper'"),
        (["optimizer.lr=-1"], "optimizer.*-1"),
        (["scheduler.warmup=2"], "warmup=2"),
        (["trainer.precision=3"], "trainer: .*3"),
        (["+trainer.colour=red"], "trainer: .*colour"),
        (["+model.colour=red"], "model: .*colour"),
        (["exclude=[nothing]"], "nothing"),
        (["data.validation=1"], "validation"),
        (["resume=last"], "hydra.run.dir"),
        (["resume=none.ckpt"], "none.ckpt"),
        (["sparsity=lottery_ticket_rewind", "resume=none.ckpt"], "resume=last"),
        (["sparsity/allocation=per_layer", "sparsity.allocation.densities_by_name={*:0.5}"], "0.5"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path, overrides, message):
    with pytest.raises(ConfigurationError, match=message):
        run(config(*overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_overwritten_nor_resumed_as_another(tmp_path):
    run(config("trainer.max_epochs=1"), tmp_path)
    with pytest.raises(ConfigurationError, match="earlier run"):
        run(config(), tmp_path)
    with pytest.raises(StateError, match="density"):
        run(config("resume=last", "density=0.3"), tmp_path)
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"damaged")
    with pytest.raises(ConfigurationError, match="damaged"):
        run(config("resume=last"), tmp_path)


def test_a_diverged_run_still_has_a_valid_summary(tmp_path):
    summary = Summary(
        "set", 0, 1, 1.0, Density(0.1, 0.1, []), Quality(0.1, float("nan")), Flops(0.1, 0.1), Topology(0, 1.0)
    )
    summary.write(tmp_path)
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["test"]["loss"] is None
    assert Summary.read(tmp_path).test.loss is None
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    (tmp_path / "summary.json").write_text(text[:50])
    with pytest.raises(DataError, match=r"summary\.json"):
        Summary.read(tmp_path)


def test_discarding_restores_what_was_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "a" / "run"
    (old / ".hydra").mkdir(parents=True)
    (old / ".hydra" / "config.yaml").write_text("old")
    (old / "notes.txt").write_text("mine")
    sweep.Before.remember("a/run")
    (old / ".hydra" / "config.yaml").write_text("new")
    (old / "metrics.csv").write_text("new")
    (old / "wandb" / "x").mkdir(parents=True)
    sweep.discard()
    assert (old / ".hydra" / "config.yaml").read_text() == "old"
    assert sorted(p.name for p in old.iterdir()) == [".hydra", "notes.txt"]

    sweep.Before.remember("b/run")
    (tmp_path / "b" / "run" / ".hydra").mkdir(parents=True)
    sweep.discard()
    assert not (tmp_path / "b").exists()

    sweep.Before.remember("c/run")
    (tmp_path / "c" / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "c" / "run" / "checkpoints" / "last.ckpt").write_text("worth keeping")
    sweep.discard()
    assert (tmp_path / "c" / "run" / "checkpoints" / "last.ckpt").exists()


def rates(factory, total, **settings):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = factory(optimizer, total, **settings)
    seen = []
    for _ in range(total + 1):
        seen.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return seen


def test_learning_rates():
    assert rates(cosine, 4) == pytest.approx([1, 0.8535534, 0.5, 0.1464466, 0])
    assert rates(cosine, 4, warmup=0.5, final=0.2) == pytest.approx([0.5, 1, 1, 0.6, 0.2])
    assert rates(step, 8, milestones=[0.25, 0.5], gamma=0.1)[:5] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    for factory, wrong in ((cosine, {"warmup": 1}), (cosine, {"final": 2}), (step, {"milestones": [3]})):
        with pytest.raises(ConfigurationError):
            rates(factory, 4, **wrong)
