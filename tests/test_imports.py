"""The core needs torch and numpy alone."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

import dst

CORE = [
    "dst",
    "dst.allocation",
    "dst.backends",
    "dst.engine.dry_run",
    "dst.engine.lottery",
    "dst.engine.sparsifier",
    "dst.init",
    "dst.method",
    "dst.methods",
    "dst.metrics",
    "dst.models",
    "dst.nn",
    "dst.schedules",
    "dst.scores",
    "dst.topology.layers",
    "dst.topology.mask_file",
    "dst.topology.optimizer_state",
    "dst.types",
]


def test_what_is_imported_when(tmp_path):
    """`dst --help` needs no torch, the core nothing that is slow beside it, looking at a checkpoint neither Lightning nor
    Hydra; names are the same in any order.

    One process answers all of it, in the order of what needs more: importing takes longer than any of the questions.
    """
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.save(dst.Sparsifier(model, optimizer, dst.methods.set_(0.5), total_steps=5).state_dict(), tmp_path / "s.pt")
    code = f"""
import importlib, sys, dst
from dst.cli.main import main
assert main(["--help"]) == main(["--version"]) == main(["methods", "--help"]) == 0
slow = {{"torch", "numpy", "rich", "hydra", "omegaconf", "lightning", "scipy", "jinja2"}}
print(sorted(slow & set(sys.modules)), file=sys.stderr)
import torch
before = torch.get_rng_state()
dst.Sparsifier, dst.prepare, dst.methods.rigl(0.1)
slow = {{"lightning", "hydra", "rich", "sklearn", "scipy", "torchmetrics", "wandb", "torch.distributed.tensor", "sympy"}}
print(sorted(slow & set(sys.modules)), file=sys.stderr)
for name in {CORE}:
    importlib.import_module(name)
print(torch.equal(before, torch.get_rng_state()), file=sys.stderr)  # imports draw no random numbers
heavy = {{"lightning", "pytorch_lightning", "hydra", "omegaconf", "torchmetrics", "wandb", "sklearn"}}
print(sorted(heavy & {{name.partition(".")[0] for name in sys.modules}}), file=sys.stderr)
from importlib.machinery import PathFinder
find = PathFinder.find_spec
absent = heavy | {{"rich", "scipy", "jinja2"}}
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in absent else find(name, *rest)
import torch
model = dst.models.LeNet300100((1, 8, 8), 10)
dst.plan(model, dst.methods.rigl(0.1))
sparsifier = dst.Sparsifier(model, torch.optim.SGD(model.parameters(), 0.1), dst.methods.rigl(0.1), total_steps=200)
model(torch.zeros(2, 1, 8, 8)).sum().backward()
sparsifier.before_step()
dst.prepare(torch.nn.Sequential(torch.nn.Linear(20, 20)), dst.methods.rigl(0.1, backend="csr"))
for module, name in ((dst, "data"), (dst.metrics, "MaskDensity"), (dst.metrics, "LossSpikes")):
    try:
        getattr(module, name)
    except ImportError as error:
        print(error, file=sys.stderr)
PathFinder.find_spec = find
from dst.report.inspection import inspect_checkpoint
inspect_checkpoint({str(tmp_path / "s.pt")!r})
print(sorted({{"lightning", "hydra", "torchmetrics"}} & set(sys.modules)), file=sys.stderr)
print(callable(dst.plan), dst.lightning.SparseTraining.__name__, file=sys.stderr)
print(sorted(dir(dst)) == sorted([*dst.__all__, "__version__"]), file=sys.stderr)
print([name for name in dst.__all__ if getattr(dst, name, None) is None], file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stderr.splitlines() == [
        "[]",
        "[]",
        "True",
        "[]",
        "dst.data needs rich, which is not installed; reinstalling dst installs its dependencies",
        "dst.metrics.MaskDensity needs torchmetrics, which is not installed; reinstalling dst installs its dependencies",
        "dst.metrics.LossSpikes needs torchmetrics, which is not installed; reinstalling dst installs its dependencies",
        "[]",
        "True SparseTraining",
        "True",
        "[]",
    ]
    with pytest.raises(AttributeError, match="no attribute 'Sparsifer'"):
        importlib.import_module("dst").Sparsifer()


@pytest.mark.parametrize("name", ["Method", "Sparsifier", "methods", "plan", "prepare", "save_masks", "load_masks"])
def test_public_names(name):
    assert name in dst.__all__
    assert getattr(dst, name) is not None


def test_every_public_name_is_documented():
    assert dst.__doc__ is not None
    assert [name for name in dst.__all__ if f"`{name}`" not in dst.__doc__] == []
    assert not [name for name in dir(dst) if name.startswith("_") and name != "__version__"]
