"""The core stands on torch alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

CORE = [
    "dst",
    "dst.allocation",
    "dst.backends",
    "dst.init",
    "dst.layers",
    "dst.lottery",
    "dst.mask_file",
    "dst.method",
    "dst.methods",
    "dst.metrics",
    "dst.models",
    "dst.nn",
    "dst.optimizer_state",
    "dst.plan",
    "dst.schedules",
    "dst.scores",
    "dst.sparsifier",
    "dst.topology",
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


@pytest.mark.parametrize("name", ["Method", "Sparsifier", "methods", "plan", "prepare", "save_masks", "load_masks"])
def test_public_names(name):
    import dst

    assert name in dst.__all__
    assert getattr(dst, name) is not None
