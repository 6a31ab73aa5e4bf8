"""Every kind of model and data from the command line: training, exact resumption, and errors for mismatches."""

from __future__ import annotations

import shutil
from functools import partial

import pytest

from dst.cli.build import build
from dst.cli.train import run
from dst.data import Digits
from dst.errors import ConfigurationError
from dst.models.classifier import Classifier
from tests.cli.runs import composed, metrics

TEXT = ["data=text", "data.max_chars=6000", "data.context=16", "data.batch_size=16", "optimizer=adamw"]
GPT = ["model=gpt", "model.width=16", "model.depth=2", "model.heads=2", *TEXT]
VIT = ["model=vit_tiny", "model.width=24", "model.depth=1", "data=digits", "optimizer=adamw"]
RUNS = {
    "gpt": GPT,
    "experts": [*GPT, "model.experts=2"],
    "gru_char": ["model=gru_char", "model.width=16", *TEXT],
    "gru": ["model=gru", "model.width=32"],
    "vit_tiny": VIT,
    "k_winners": ["model=mlp", "model.width=40", "model/activation=k_winners", "model.activation.density=0.2"],
    "top_k_relu": ["model=convnet", "model.width=4", "model/activation=top_k_relu"],
}


config = partial(composed, "trainer.max_epochs=2", "sparsity=rigl", "sparsity.update_every=5", "report=false")


@pytest.mark.parametrize("name", RUNS)
def test_trains_and_resumes_exactly(tmp_path, monkeypatch, name):
    settings = [*RUNS[name], "density=0.3"]
    folder, cut = tmp_path / "run", tmp_path / "cut"
    calls_after = iter(range(10**6))
    original = Classifier.training_step

    def training_step(self, batch, index):
        # The folder as a power cut would leave it, in the middle of the second epoch.
        if (folder / "checkpoints" / "last.ckpt").exists() and next(calls_after) == 5:
            shutil.copytree(folder, cut, symlinks=True)
        return original(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", training_step)
        whole = run(config(*settings), folder)
    assert whole.topology.updates >= 2
    assert abs(whole.density.realised - 0.3) < 0.01
    assert 0 < whole.flops.inference_ratio < 1
    assert not (cut / "summary.json").exists()
    folder.rename(tmp_path / "whole")
    cut.rename(folder)
    resumed = run(config(*settings, "resume=last"), folder)
    assert (resumed.test, resumed.density) == (whole.test, whole.density)
    assert metrics(folder) == metrics(tmp_path / "whole")


def test_language_models_report_bits_per_character(tmp_path):
    summary = run(config(*GPT), tmp_path)
    rows = metrics(tmp_path)
    for split in ("train", "val", "test"):
        (bits, loss), *_ = [
            (float(row[f"{split}/bits_per_character"]), float(row[f"{split}/loss"]))
            for row in rows
            if f"{split}/loss" in row
        ]
        assert bits == pytest.approx(loss * 1.442695, rel=1e-5)
    assert summary.test.loss == pytest.approx(loss)
    assert not any("bits_per_character" in name for row in metrics_of_digits(tmp_path) for name in row)


def metrics_of_digits(tmp_path):
    run(config("model=mlp", "model.width=8", "trainer.max_epochs=1"), tmp_path / "digits")
    return metrics(tmp_path / "digits")


def test_a_text_of_ones_own_by_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "rhyme.txt").write_text("the cat sat on the mat, and that was that. " * 200)
    # Hydra may change the directory for a run; paths are from where the command was started.
    monkeypatch.setattr("dst.cli.build.to_absolute_path", lambda path: str(tmp_path / path))
    summary = run(config(*GPT, "data.path=rhyme.txt", "data.max_chars=null", "optimizer.lr=1e-2"), tmp_path / "run")
    assert summary.test.accuracy > 0.5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model=gpt", "data=digits"],
            r"dst\.models\.GPT is not made for dst\.data\.Digits.*input_shape and num_classes",
        ),
        (["model=gru_char"], r"GRUCharModel is not made for dst\.data\.Digits"),
        (["model=resnet20", "data=text"], r"ResNet20 is not made for dst\.data\.Text.*vocab_size and context"),
        (["model=vit_tiny", "model.patch=16"], "patch=16 does not divide images of 8x8"),
        (["model=mlp", "model/activation=k_winners", "model.activation.density=0"], "density=0 must lie"),
        (["model=gpt", "data=text", "model.experts=1"], "experts=1 must be"),
        (["model=gpt", "data=text", "data.path=nowhere.txt"], r"Cannot read .*nowhere\.txt"),
    ],
)
def test_refuses_what_does_not_fit(overrides, message):
    with pytest.raises(ConfigurationError, match=message):
        build(config(*overrides))


class Foreign(Digits):
    """A user's data module with only shapes and classes."""

    task = None


def test_data_modules_that_know_shape_and_classes_alone_are_of_images():
    parts = build(config("data._target_=tests.cli.test_models.Foreign", "model=gru"))
    assert type(parts.module) is Classifier
    assert parts.operations.macs["model.recurrent.weight_ih_l0"] == 3 * 128 * 8 * 8
