"""Fixtures for runs in this process."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dst.metrics.latency import time_passes


@pytest.fixture(autouse=True)
def _brief_timing(monkeypatch):
    """Time three forward passes, not a tenth of a second of them."""
    monkeypatch.setattr("dst.cli.results.time_passes", partial(time_passes, seconds=0.0))


@pytest.fixture(autouse=True)
def _threads():
    """Restore torch's number of threads, which a run sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
