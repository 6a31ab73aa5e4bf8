from __future__ import annotations

import gc
import os
import signal
import sys
from typing import Any

# One thread a process: workers share the cores, and what they start must not wake a pool of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from tests import sampling

settings.register_profile("repo", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("repo")
torch.set_num_threads(1)


_LEFT = pytest.StashKey[dict[int, str]]()


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


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """End what tests share, and fail where something else is still running."""
    from tests import leftovers

    if processes := sys.modules.get("tests.distributed.processes"):
        processes.close()
    if wandb := sys.modules.get("wandb"):
        wandb.teardown()  # its service lives until then
    if session.config.getoption("numprocesses", None):  # the workers have looked
        found = session.config.stash.get(_LEFT, {})
    else:
        found = leftovers.left_over()
        for process, command in found.items():
            sys.__stderr__.write(f"left running by the tests: {process} {command}\n")
            os.kill(process, signal.SIGKILL)
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_running"] = found
    if found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """Take over what a worker found running at its end."""
    found = getattr(node, "workeroutput", {}).get("left_running", {})
    node.config.stash.setdefault(_LEFT, {}).update(found)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same global random state."""
    torch.manual_seed(0)
