"""Measured and predicted costs of a run, and where they are shown."""

from __future__ import annotations

import json
import types
from dataclasses import replace

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from dst.cli import main as cli
from dst.cli.build import build
from dst.cli.train import run
from dst.lightning.spent import Spent
from dst.metrics import Energy, energy
from dst.metrics.latency import time_passes
from dst.metrics.passes import batch_of
from dst.metrics.prediction import Prediction
from dst.report import write_report
from dst.report.compare import compare, read_runs
from dst.report.summary import EnergyUse, Latency, MemoryUse, Summary
from dst.report.terminal import show
from dst.topology.layers import find_layers
from tests.metrics.counter import Counter
from tests.report.runs import make_run

MEMORY = MemoryUse(
    3.0, 400.0, "resident memory", {"weights": 1.0, "gradients": 2.0}, {"batch_size": 32, "before_mib": 390.0}
)
LATENCY = Latency(0.5, 2.0, {"batch_size": 32, "device": "cpu", "threads": 1})
ENERGY = EnergyUse(10.0, 0.1, 0.001, "1 GPU (NVML)")


def with_costs(folder, **flops):
    summary = Summary.read(make_run(folder, ["a"], executed=1.0))
    summary = replace(summary, memory=MEMORY, latency=LATENCY, energy=ENERGY, flops=replace(summary.flops, **flops))
    summary.write(folder)
    return summary


@pytest.fixture
def counted(monkeypatch):
    """A machine with one energy counter."""
    monkeypatch.setattr(energy, "available_meters", lambda device: [Counter()])


def test_batches_repeat_the_example():
    like = torch.zeros(1, dtype=torch.float64)
    ((images,), _) = batch_of((3, 4, 4), 5, like)
    assert (images.shape, images.dtype) == ((5, 3, 4, 4), torch.float64)
    ((tokens,), _) = batch_of(torch.arange(6).view(2, 3), 3, like)
    assert tokens.tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    (_, named) = batch_of({"x": torch.zeros(4, 2), "scale": 3.0}, 1, like)
    assert (named["x"].shape, named["scale"]) == ((1, 2), 3.0)


def test_passes_run_in_evaluation_and_leave_the_mode(counted):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    passes = time_passes(model, (4,), 3, seconds=0.001)
    assert passes.repeats >= 3
    assert passes.seconds > 0
    assert passes.energy.joules == 1 / passes.repeats
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_counter_that_does_not_move_measures_no_passes(monkeypatch):
    monkeypatch.setattr(
        energy, "available_meters", lambda device: [types.SimpleNamespace(source="x", joules=lambda: 5.0)]
    )
    assert time_passes(nn.Linear(4, 4), (4,), 3, seconds=0.001).energy is None


TRAINER = types.SimpleNamespace(strategy=types.SimpleNamespace(root_device=torch.device("cpu")))


def test_energy_accumulates_over_a_resume(counted, monkeypatch):
    first = Spent()
    assert first.energy is None
    assert first.state_dict() == {}
    first.on_train_start(TRAINER, None)
    saved = json.loads(json.dumps(first.state_dict()))
    assert saved["joules"] == 1
    second = Spent()
    second.load_state_dict(saved)
    assert second.energy.joules == 1
    monkeypatch.setattr(energy, "available_meters", lambda device: [Counter("another")])
    second.on_train_start(TRAINER, None)
    second.on_train_end(TRAINER, None)
    assert second.energy.joules == 2
    assert second.energy.sources == ("a counter", "another")
    assert second.energy.seconds > saved["seconds"] == second.seconds_before > 0
    total = second.energy
    assert second.energy == total  # nothing is added after the end
    assert second.memory.peak > 0


def test_time_is_saved_where_energy_is_not_measured(counted, monkeypatch):
    monkeypatch.setattr(energy, "available_meters", lambda device: [])
    first = Spent()
    first.on_train_start(TRAINER, None)
    saved = json.loads(json.dumps(first.state_dict()))
    assert (saved["joules"], saved["sources"]) == (None, [])
    assert saved["seconds"] > 0
    monkeypatch.undo()
    second = Spent()
    second.load_state_dict(saved)
    second.on_train_start(TRAINER, None)
    second.on_train_end(TRAINER, None)
    assert second.energy is None  # a part is not known
    assert second.state_dict()["seconds"] > second.seconds_before == saved["seconds"]


@pytest.mark.parametrize("estimated", [True, False])
def test_estimates_of_earlier_versions_are_dropped(estimated):
    spent = Spent()
    spent.load_state_dict({"joules": 3.0, "seconds": 2.0, "sources": ["CPU"], "estimated": estimated})
    assert spent.seconds_before == 2
    assert spent.energy == (None if estimated else Energy(3.0, 2.0, ("CPU",)))


class NeedsValues(nn.Module):
    """Its forward pass depends on values, which a model on the meta device has not."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.linear(x) if float(x.sum()) == 0 else x


@pytest.mark.parametrize("wrapped", [nn.Sequential(nn.Linear(4, 3, bias=False)), NeedsValues()])
def test_memory_is_predicted_before_modules_are_swapped(wrapped):
    layers, _ = find_layers(wrapped)
    prediction = Prediction(wrapped, (4,), 8, layers)
    (name,) = (layer.label for layer in layers)
    memory = prediction.memory({name: 6}, {name: "csr"}, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), dynamic=False)
    assert (memory.weights, memory.gradients, memory.optimizer_state) == (48, 24, 24)
    assert memory.activations == 8 * 4 * 4


def test_parts_of_a_parameter_add_up():
    model = nn.MultiheadAttention(4, 2, bias=False)
    layers, _ = find_layers(model)
    sample = {name: torch.zeros(1, 1, 4) for name in ("query", "key", "value")}
    prediction = Prediction(model, sample, 1, [x for x in layers if x.label != "in_proj_weight[q]"])
    labels = [x.label for x in prediction._layers]
    found = prediction.memory(
        dict.fromkeys(labels, 4), dict.fromkeys(labels, "csr"), lambda p: torch.optim.SGD(p, 0.1), dynamic=False
    )
    assert found.gradients == 4 * (16 + 4 + 4 + 4)


@pytest.fixture
def config():
    before = torch.get_num_threads()
    cli.register_schema()
    quick = ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "trainer.max_epochs=1", "report=false"]
    with initialize_config_dir(str(cli.config_dir()), version_base="1.3"):
        yield lambda *overrides: compose("train", [*quick, *overrides])
    torch.set_num_threads(before)


def test_a_run_on_non_zeros_says_so_in_every_cost(config, tmp_path, counted):
    summary = run(config("backend=csr", "convention=macs"), tmp_path)
    parts = {name: mib * 2**20 for name, mib in summary.memory.parts.items()}
    nonzero, biases = sum(layer["nonzero"] for layer in summary.density.layers), 300 + 100 + 10
    assert parts["gradients"] == parts["optimizer_state"] == 4 * (nonzero + biases)
    assert parts["weights"] == 4 * (2 * nonzero + biases)
    assert sum(parts.values()) == pytest.approx(summary.memory.predicted_mib * 2**20)
    assert summary.memory.peak_mib >= summary.memory.conditions["before_mib"] > 0
    assert summary.flops.executed_ratio == summary.flops.inference_ratio < 0.11
    assert summary.flops.dense_inference == 50_200
    assert summary.latency.one_ms > 0
    assert summary.latency.conditions == {"batch_size": 32, "device": "cpu", "threads": torch.get_num_threads()}
    assert summary.energy.training_joules == pytest.approx(summary.energy.step_joules * summary.steps)
    assert summary.energy.inference_joules > 0
    assert summary.energy.source == "a counter"
    assert Summary.read(tmp_path) == summary


@pytest.mark.parametrize("model", ["gpt", "gru", "resnet20", "vit_tiny", "convnet"])
def test_memory_of_every_kind_of_model_is_predicted(config, model, tmp_path):
    extra = ["data=text", f"data.path={tmp_path / 'text.txt'}"] if model == "gpt" else []
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 400)
    parts = build(config(f"model={model}", *extra))
    small, large = (Prediction(parts.module, parts.example, size, parts.layers) for size in (2, 4))
    labels = {layer.label: layer.weights for layer in parts.layers}
    homes = dict.fromkeys(labels, "masked")
    a, b = (p.memory(labels, homes, parts.module.optimizer, dynamic=True) for p in (small, large))
    assert b.activations > 1.8 * a.activations > 0
    assert a.weights == b.weights > 0


def test_table_and_report_list_what_is_not_counted(tmp_path, capsys):
    line = "model.fft: aten.fft ran 2× and is not counted: its cost is unknown"
    summary = with_costs(tmp_path, uncounted=[line], dense_inference=1000.0, training_executed_ratio=0.9)
    show(summary.renderable())
    table = capsys.readouterr().out
    write_report(tmp_path, tmp_path / "report.html")
    for text in (table, (tmp_path / "report.html").read_text()):
        assert line in text
        assert "90.00%" in text
        assert "two per multiply-accumulate" in text
        assert "3 MiB at batch size 32" in text
        assert "0.5 ms, 2 ms a batch of 32 (cpu, 1 thread)" in text
        assert "10 J, 0.1 J a step (1 GPU (NVML))" in text
        assert "0.001 J a sample (1 GPU (NVML))" in text


def test_loggers_get_numbers_and_no_words(tmp_path):
    scalars = with_costs(tmp_path).scalars()
    assert scalars["summary/memory.predicted_mib"] == 3
    assert scalars["summary/memory.parts.gradients"] == 2
    assert scalars["summary/energy.training_joules"] == 10
    assert "summary/energy.source" not in scalars


def test_costs_are_compared_and_what_they_are_made_of_is_not(tmp_path):
    with_costs(tmp_path)
    comparison = compare(read_runs([tmp_path]))
    costs = [name for name in comparison.metrics if not name.startswith(("test.", "density.", "flops."))]
    assert costs == [
        "memory.predicted_mib", "memory.peak_mib", "latency.one_ms", "latency.batch_ms",
        "energy.training_joules", "energy.step_joules", "energy.inference_joules",
    ]  # fmt: skip
    assert comparison.fronts.keys() >= set(costs)


def test_summaries_of_earlier_versions_are_read(tmp_path, capsys):
    path = make_run(tmp_path, ["a"]) / "summary.json"
    summary = json.loads(path.read_text())
    for part in ("memory", "latency", "energy"):
        del summary[part]
    summary["test"] = {"accuracy": 0.9, "loss": 0.3}
    summary["flops"] = {"inference_ratio": 0.25, "training_ratio": 0.28}
    path.write_text(json.dumps(summary))
    old = Summary.read(tmp_path)
    assert (old.memory, old.latency, old.energy) == (None, None, None)
    assert old.test.weights == "last"
    show(old.renderable())
    assert "last weights" in capsys.readouterr().out
    write_report(tmp_path, tmp_path / "report.html")


@pytest.mark.parametrize("estimated", [True, False])
def test_energy_that_an_earlier_version_estimated_is_left_out(tmp_path, estimated):
    summary = with_costs(tmp_path)
    path = tmp_path / "summary.json"
    values = json.loads(path.read_text())
    values["energy"]["estimated"] = estimated
    path.write_text(json.dumps(values))
    assert Summary.read(tmp_path) == replace(summary, energy=None if estimated else ENERGY)
