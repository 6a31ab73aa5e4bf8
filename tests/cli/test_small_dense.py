"""``sparsity=small_dense`` from the command line: a narrower dense network, measured against the one of full size."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from dst.cli.build import build
from dst.cli.train import run
from dst.errors import ConfigurationError, StateError
from dst.models.classifier import Classifier
from dst.report.inspection import inspect_checkpoint
from dst.report.summary import Summary
from tests.cli.runs import composed, without_time

config = partial(composed, "trainer.max_epochs=2", "sparsity=small_dense")


class PowerCut(Exception):
    """Stands for any end of a process."""


def test_reports_are_relative_to_full_size_and_a_resume_is_exact(tmp_path, monkeypatch, caplog):
    settings = ["density=0.1"]
    whole = run(config(*settings), tmp_path / "whole")
    assert "makes nothing sparse" not in caplog.text  # the model is narrow
    weights = torch.load(tmp_path / "whole" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    kept = {name: w.numel() for name, w in weights.items() if w.ndim == 2}
    assert kept["model.hidden.0.weight"] == weights["model.hidden.0.weight"].shape[0] * 64
    assert whole.density.target == 0.1
    assert whole.density.realised == sum(kept.values()) / 50_200
    assert whole.density.realised == pytest.approx(0.1, rel=0.02)
    assert [(x["name"], x["shape"], x["weights"], x["nonzero"]) for x in whole.density.layers] == [
        ("model.hidden.0.weight", [300, 64], 19_200, kept["model.hidden.0.weight"]),
        ("model.hidden.1.weight", [100, 300], 30_000, kept["model.hidden.1.weight"]),
        ("model.classifier.weight", [10, 100], 1_000, kept["model.classifier.weight"]),
    ]
    # A linear layer multiplies once per weight, and every step is a dense one of the narrow network.
    assert whole.flops.inference_ratio == pytest.approx(whole.density.realised)
    assert whole.flops.training_ratio == pytest.approx(whole.density.realised)
    assert whole.topology.updates == 0
    assert whole.topology.exploration_rate == pytest.approx(whole.density.realised)
    assert Summary.read(tmp_path / "whole") == whole

    calls = iter(range(10**6))
    original = Classifier.training_step

    def training_step(self, batch, index):
        if next(calls) == 60:
            raise PowerCut
        return original(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", training_step)
        with pytest.raises(PowerCut):
            run(config(*settings), tmp_path / "cut")
    for other in (["density=0.2"], ["density=0.1", "sparsity.match=flops"], ["density=0.1", "sparsity=rigl"]):
        with pytest.raises(StateError, match=r"the checkpoint is of another method.*narrow"):
            run(config(*other, "resume=last"), tmp_path / "cut")
    resumed = run(config(*settings, "resume=last"), tmp_path / "cut")
    assert without_time(resumed) == without_time(whole)
    (found,) = [inspect_checkpoint(tmp_path / "cut")]
    assert (found.problems(), found.facts["method"]) == ([], "small_dense")


def test_flops_are_matched_where_they_are_asked_for():
    settings = ["model=convnet", "density=0.1"]
    parts = {m: build(config(*settings, f"sparsity.match={m}")) for m in ("parameters", "flops")}
    for match, made in parts.items():
        full = made.full_size
        shares = {
            "parameters": sum(x.weights for x in made.layers) / sum(x.weights for x in full.layers),
            "flops": sum(made.operations.macs.values()) / sum(full.operations.macs.values()),
        }
        assert shares[match] == pytest.approx(0.1, rel=0.05)
        assert made.method.narrow.match == match
    assert parts["flops"].method.narrow.width_factor < parts["parameters"].method.narrow.width_factor


def test_layers_that_do_not_count_stay_in_the_flops(tmp_path):
    summary = run(config("density=0.1", "exclude=[model.hidden.0*]", "trainer.max_epochs=1"), tmp_path)
    assert [x["name"] for x in summary.density.layers] == ["model.hidden.1.weight", "model.classifier.weight"]
    assert summary.density.realised == pytest.approx(0.1, rel=0.05)
    weights = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    kept = sum(w.numel() for w in weights.values() if w.ndim == 2)
    assert summary.flops.inference_ratio == pytest.approx(kept / 50_200)
    assert summary.flops.inference_ratio > 1.2 * summary.density.realised


def test_full_size_is_what_the_model_settings_say():
    plain, wide = (build(config("density=0.25", *more)) for more in ([], ["model.width_factor=2"]))
    assert sum(x.weights for x in wide.full_size.layers) == 600 * 64 + 600 * 200 + 200 * 10
    assert sum(x.weights for x in wide.layers) > 3 * sum(x.weights for x in plain.layers)
    assert build(config("density=1")).method.narrow.width_factor == 1


class Foreign(nn.Module):
    """A user's model without width factors."""

    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.layer = nn.Linear(64, num_classes)

    def forward(self, images):
        return self.layer(images.flatten(1))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["~model", f"+model._target_={__name__}.Foreign"],
            r"Foreign takes no width_factor.*give it a parameter.*sparsity=dense",
        ),
        (["density=0.001"], r"density=0\.001 is less than LeNet300100 has at its narrowest.*larger density"),
        (["sparsity.match=time"], "match='time' is unknown"),
        (["model.width_factor=0"], "width_factor must be a positive number, got 0"),
    ],
)
def test_what_cannot_be_narrowed_is_refused_before_anything_is_written(tmp_path, overrides, message):
    with pytest.raises(ConfigurationError, match=message):
        run(config("density=0.1", *overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
