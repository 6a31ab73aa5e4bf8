"""The short version of experiments/grown_warmup: warm-up makes the loss rise less after updates, and costs no accuracy."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "experiments" / "grown_warmup" / "measure.py"


@pytest.fixture
def measure(monkeypatch):
    spec = importlib.util.spec_from_file_location("measure", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "measure", module)
    spec.loader.exec_module(module)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(before)


def test_rises_are_relative_to_the_losses_before_an_update(measure):
    nan = float("nan")
    losses = [nan, 2.0, 2.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0, nan]
    assert measure.rise(losses, [5]) == pytest.approx(0.5)


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPT.exists(), reason="no checkout")
def test_spikes_shrink_and_accuracy_stays(measure):
    settings = {"lr": 3e-2, "fraction": 0.5, "update_every": 24, "steps": 104, "width": 32}
    plain, warm = (measure.train(measure.Setting(n, 0, **settings)) for n in (0, 24))
    assert plain.peak > 0.01
    assert warm.peak < plain.peak / 1.5
    assert warm.rise < plain.rise
    assert warm.test_accuracy > plain.test_accuracy - 0.01
