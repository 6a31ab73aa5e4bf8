from __future__ import annotations

import gc
import os

# One thread per process: workers share the cores, and their child processes must not start thread pools.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from tests import sampling
from tests.leftovers import pytest_sessionfinish, pytest_testnodedown  # noqa: F401 (hooks)

settings.register_profile("repo", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("repo")
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Collect whole products if ``-m`` names them or a single test is selected."""
    sampling.everything = "exhaustive" in config.getoption("-m") or any("[" in argument for argument in config.args)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that are marked ``exhaustive``."""
    if sampling.everything:
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exclude all imported modules from garbage collection, which would walk torch's modules in vain."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same global random state."""
    torch.manual_seed(0)
