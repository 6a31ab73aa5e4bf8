"""Inspection of checkpoints of every kind, valid and damaged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dst
from dst.cli import main as cli
from dst.errors import StateError
from dst.report.inspection import inspect_checkpoint
from tests import small


def trained(steps: int = 6):
    torch.manual_seed(0)
    model = small.Small()
    optimizer = small.OPTIMIZERS["adamw"](model.parameters())
    sparsifier = dst.Sparsifier(model, optimizer, dst.methods.rigl(0.3, update_every=2), total_steps=12)
    small.train(model, optimizer, sparsifier, steps)
    return model, sparsifier


def save(path, value):
    torch.save(value, path)
    return path


def test_a_plain_state_and_one_within_a_checkpoint(tmp_path):
    model, sparsifier = trained()
    alone = inspect_checkpoint(save(tmp_path / "state.pt", sparsifier.state_dict()))
    assert alone.kind == "state of a sparsifier"
    assert alone.facts["method"] == "rigl"
    assert alone.facts["step"] == "6 of 12"
    assert alone.facts["topology updates"] == str(sparsifier.updates)
    assert alone.facts["explored"].startswith(f"{100 * sparsifier.exploration_rate:.2f}%")
    assert alone.target == 0.3
    assert alone.realised == sparsifier.density
    table = sparsifier.layer_table()
    assert [(x.name, list(x.shape), x.weights, x.active, x.density) for x in alone.layers] == [
        tuple(row.values()) for row in table
    ]
    assert all(layer.zeros is None for layer in alone.layers)

    content = {"model": model.state_dict(), "extra": {"sparsifier": sparsifier.state_dict()}, "epoch": 3}
    within = inspect_checkpoint(save(tmp_path / "mine.pt", content))
    assert within.kind == "checkpoint of a sparse training"
    assert within.facts["epoch"] == "3"
    assert all(layer.leaks == 0 for layer in within.layers)
    # Each part of the packed projection is looked at by itself.
    for i, part in enumerate("qkv"):
        (layer,) = [x for x in within.layers if x.name == f"attention.in_proj_weight[{part}]"]
        mask = sparsifier.masks["attention.in_proj_weight"][8 * i : 8 * i + 8]
        assert layer.dead_outputs == int((~mask.any(1)).sum())
        assert layer.dead_inputs == int((~mask.any(0)).sum())


def test_weights_off_the_mask_and_a_missed_target_are_problems(tmp_path):
    model, sparsifier = trained()
    state = sparsifier.state_dict()
    with torch.no_grad():
        model.hidden.weight[~sparsifier.masks["hidden.weight"]] = 1
    state["method"]["density"] = 0.6
    content = {"state_dict": model.state_dict(), "sparsifier": state}
    problems = inspect_checkpoint(save(tmp_path / "bad.pt", content)).problems()
    leaks = int((~sparsifier.masks["hidden.weight"]).sum())
    assert f"hidden.weight has {leaks} inactive weights that are not zero" in problems
    assert f"the realised density {sparsifier.density:.6g} is not the target 0.6" in problems


def test_mask_files(tmp_path):
    masks = {"a": torch.tensor([[True, False], [False, False]]), "b": torch.zeros(1, 2, dtype=torch.bool)}
    masks["c"] = torch.ones(2, 2, dtype=torch.bool)
    dst.save_masks(masks, tmp_path / "masks.pt")
    found = inspect_checkpoint(tmp_path / "masks.pt")
    assert found.kind == "masks"
    assert found.target is None
    assert found.realised == 5 / 10
    assert found.problems() == [
        "a is not connected to 1 of 2 outputs and 1 of 2 inputs",
        "b has collapsed: no connection is left",
    ]


def test_weights_alone(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
    found = inspect_checkpoint(save(tmp_path / "weights.pt", model.state_dict()))
    assert found.kind.startswith("weights alone")
    assert [(layer.name, layer.active) for layer in found.layers] == [("0.weight", 3)]


def test_a_dense_phase_has_no_target_yet(tmp_path):
    model = small.Small()
    optimizer = small.OPTIMIZERS["sgd"](model.parameters())
    sparsifier = dst.Sparsifier(model, optimizer, dst.methods.static(0.3, sparsify_at=3), total_steps=6)
    found = inspect_checkpoint(save(tmp_path / "state.pt", sparsifier.state_dict()))
    assert "dense" in found.facts["phase"]
    assert found.target is None
    assert found.problems() == []


class Hostile:
    def __reduce__(self):
        return (print, ("executed",))


def damaged(key, value):
    state = trained(1)[1].state_dict()
    state[key] = value
    return state


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: {"x": Hostile()}, "more than plain values"),
        (lambda: {"epoch": 1}, "holds no topology"),
        (lambda: {"bias": torch.ones(3)}, "holds no topology"),
        (lambda: [1, 2], "holds a list"),
        (lambda: damaged("method", {}), "damaged"),
        (lambda: damaged("method", 5), "damaged"),
        (lambda: damaged("masks", {}), "no mask of conv.weight"),
        (lambda: damaged("masks", {"conv.weight": torch.ones(8, 2, 3, 3)}), "no mask of conv.weight"),
        (
            lambda: damaged("layers", [{"name": "conv.weight", "shape": [1, 2]}]),
            r"has shape \(8, 2, 3, 3\), not \(1, 2\)",
        ),
        (lambda: damaged("layers", []) | {"masks": {}}, "holds no sparse layer"),
        (lambda: damaged("layers", 3), "damaged"),
        (lambda: damaged("layers", [{"name": "a[q]", "shape": []}]), r"no mask of a\[q\]"),
    ],
)
def test_bad_files_are_refused_in_words(content, message, tmp_path, capsys):
    path = save(tmp_path / "bad.pt", content())
    with pytest.raises(StateError, match=message):
        inspect_checkpoint(path)
    assert cli.main(["inspect", str(path)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert "executed" not in shown.out


def test_missing_and_cut_off_files(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path / "none.ckpt")]) == 2
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert cli.main(["inspect"]) == 2
    path = save(tmp_path / "cut.pt", trained(1)[1].state_dict())
    path.write_bytes(path.read_bytes()[:2000])
    assert cli.main(["inspect", str(path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    errors = [line for line in errors if "error: " in line]
    assert len(errors) == 4
    assert "no checkpoint at" in errors[0]
    assert "last.ckpt" in errors[1]
    assert "required: path" in errors[2]
    assert "cut off" in errors[3]


def test_a_lightning_run_is_shown_with_all_its_layers(tmp_path, capsys):
    import lightning
    from torch.utils.data import DataLoader

    from dst.lightning import SparseTraining

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = small.Small()

        def training_step(self, batch, index):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    trainer = lightning.Trainer(
        max_steps=4,
        callbacks=[SparseTraining(dst.methods.set_(0.2, update_every=2))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(Module(), DataLoader(torch.randn(16, 2, 6, 6), batch_size=4))
    trainer.save_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert cli.main(["inspect", str(tmp_path)]) == 0  # the run's folder
    shown = capsys.readouterr().out
    for word in ("net.conv.weight", "net.attention.in_proj_weight[q]", "set", "target 0.2", "dead outputs", "4 of 4"):
        assert word in shown
    (row,) = [
        line for line in shown.splitlines() if line.startswith("net.attention.in_proj_weight[q] ") and "8×8" in line
    ]
    assert " 64 " in row
    assert all(layer.leaks == 0 for layer in inspect_checkpoint(tmp_path).layers)
