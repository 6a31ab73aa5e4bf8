from __future__ import annotations

import gc
import os

# One thread a process: workers share the cores, and what they start must not wake a pool of its own.
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
    """Collect whole products where ``-m`` speaks of them, or a single test is named."""
    sampling.everything = "exhaustive" in config.getoption("-m") or any("[" in argument for argument in config.args)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked ``exhaustive``."""
    if sampling.everything:
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the garbage collector pass over what was imported and collected: torch's modules are walked in vain otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same global random state."""
    torch.manual_seed(0)
