"""The short version of experiments/csr_time_to_accuracy: masked and csr runs take the same steps to the same network."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "experiments" / "csr_time_to_accuracy" / "measure.py"


@pytest.fixture
def measure(monkeypatch):
    spec = importlib.util.spec_from_file_location("measure_time", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "measure_time", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not SCRIPT.exists(), reason="no checkout")
@pytest.mark.parametrize("model", ["resnet20", "vit_tiny"])
def test_masked_and_csr_runs_take_the_same_steps(measure, model):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 1, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (24,), generator=generator)
    batches = torch.arange(24).view(3, 8)
    outputs, masks = {}, {}
    for variant in ("masked", "csr"):
        run = measure.Run(model, variant, 0.2, 100, 0, images[:8])
        run.train(images, labels, batches)
        assert run.sparsifier.step == 3
        assert run.seconds > 0
        assert 0 <= run.accuracy(images, labels) <= 1
        masks[variant] = run.sparsifier.masks
        with torch.no_grad():
            outputs[variant] = run.model.eval()(images)
    assert set(run.sparsifier.backends.values()) >= {"csr"}
    assert all(torch.equal(mask, masks["csr"][name]) for name, mask in masks["masked"].items())
    torch.testing.assert_close(outputs["csr"], outputs["masked"], rtol=2e-3, atol=2e-3)
