"""docs/measuring.md is true: its Python runs from top to bottom, its commands exist, and no diagnostic is left out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import dst
from dst import metrics
from dst.cli.main import COMMANDS, config_dir, register_schema
from dst.metrics import CONVENTIONS
from tests.report.runs import make_run

TEXT = (Path(__file__).parent.parent / "docs" / "measuring.md").read_text()
COMMAND_LINES = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
]


def test_python_blocks_run_one_after_the_other(capsys):
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, "measuring.md", "exec"), names)
    assert "hidden.0.weight" in capsys.readouterr().out


@pytest.mark.parametrize("words", [w for w in COMMAND_LINES if w[0] == "python"], ids=" ".join)
def test_training_commands_compose(words):
    register_schema()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        assert compose("train", words[2:]).convention in CONVENTIONS


def test_dst_commands_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "outputs" / "a", ["layer"])
    for i, method in enumerate(["set", "rigl"]):
        summary = make_run(tmp_path / "multirun" / "a" / str(i), ["layer"]) / "summary.json"
        summary.write_text(summary.read_text().replace('"rigl"', f'"{method}"'))
        config = summary.parent / ".hydra" / "config.yaml"
        config.write_text(config.read_text().replace("0.25", "0.1"))
    checkpoint = tmp_path / "outputs" / "a" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    model = torch.nn.Linear(8, 8)
    sparsifier = dst.Sparsifier(model, torch.optim.SGD(model.parameters(), 0.1), dst.methods.rigl(0.5), total_steps=10)
    torch.save({"state_dict": model.state_dict(), "callbacks": {"SparseTraining": sparsifier.state_dict()}}, checkpoint)
    lines = [w for w in COMMAND_LINES if w[0] == "dst"]
    assert len(lines) == 4
    for words in lines:
        assert COMMANDS[words[1]][0](words[2:]) == 0, words
    assert (tmp_path / "comparison" / "compare.html").exists()


def test_every_diagnostic_and_convention_is_named():
    for name in (*metrics._CLASSES, *CONVENTIONS, "effective_masks", "collapsed_layers", "loss_spikes", "in_degrees"):
        assert f"`{name}`" in TEXT


def test_bytes_of_a_weight_are_those_predicted():
    layer = torch.nn.Linear(1000, 1000, bias=False, device="meta")
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)

    def per(active, backend):
        named = {} if backend == "dense" else {"weight": active}
        home = "masked" if backend == "dense" else backend
        return metrics.predict_memory(layer, (), named, backend=home, optimizer=optimizer, activations=0).total / active

    assert round(per(10**6 - 1, "masked")) == 18
    assert round(per(10**6 - 1, "latent")) == 22
    assert round(per(10**6, "dense")) == 12
    assert 24 < per(10**5, "csr") < 26  # pointers, and a bit of every position for what was ever active
