"""The core stands on torch alone."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

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


def test_the_core_imports_neither_lightning_nor_hydra():
    code = f"""
import importlib, sys
for name in {CORE}:
    importlib.import_module(name)
heavy = {{"lightning", "pytorch_lightning", "hydra", "omegaconf", "torchmetrics", "wandb", "sklearn"}}
print(sorted(heavy & {{name.partition(".")[0] for name in sys.modules}}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "[]"


def test_what_is_imported_when():
    """`dst --help` needs no torch, the core nothing that is slow beside it; names are the same in any order."""
    code = """
import sys, dst
from dst.cli.main import main
assert main(["--help"]) == main(["--version"]) == main(["methods", "--help"]) == 0
slow = {"torch", "numpy", "rich", "hydra", "omegaconf", "lightning"}
print(sorted(slow & set(sys.modules)), file=sys.stderr)
dst.Sparsifier, dst.prepare, dst.methods.rigl(0.1)
slow = {"lightning", "hydra", "rich", "sklearn", "scipy", "torchmetrics", "wandb", "torch.distributed.tensor", "sympy"}
print(sorted(slow & set(sys.modules)), file=sys.stderr)
import dst.engine.dry_run
print(callable(dst.plan), dst.lightning.SparseTraining.__name__, file=sys.stderr)
print(sorted(dir(dst)) == sorted([*dst.__all__, "__version__"]), file=sys.stderr)
print([name for name in dst.__all__ if getattr(dst, name, None) is None], file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stderr.splitlines() == ["[]", "[]", "True SparseTraining", "True", "[]"]
    with pytest.raises(AttributeError, match="no attribute 'Sparsifer'"):
        importlib.import_module("dst").Sparsifer()


@pytest.mark.parametrize("name", ["Method", "Sparsifier", "methods", "plan", "prepare", "save_masks", "load_masks"])
def test_public_names(name):
    import dst

    assert name in dst.__all__
    assert getattr(dst, name) is not None
