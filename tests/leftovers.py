"""Processes that tests leave running. ``conftest.py`` installs the hooks, which fail the session if there are any."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

_LEFT = pytest.StashKey[dict[int, str]]()


def children(of: int | None = None) -> dict[int, str]:
    """Process id to command line of all processes below one (by default this one); none where there is no ``/proc``."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        if fields[0] != "Z":
            parents[int(entry.parent.name)] = int(fields[1])
    found, above = {}, {os.getpid() if of is None else of}
    while above:
        above = {process for process, parent in parents.items() if parent in above}
        for process in above:
            try:
                found[process] = Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ").strip()
            except OSError:
                continue
    return found


def left_over() -> dict[int, str]:
    """The running children of this process, without multiprocessing's resource tracker."""
    multiprocessing.active_children()  # collects those that have ended
    return {p: c for p, c in children().items() if c and "resource_tracker" not in c and "semaphore_tracker" not in c}


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """End the processes that tests share, and fail if others are still running."""
    if processes := sys.modules.get("tests.distributed.processes"):
        processes.close()
    if wandb := sys.modules.get("wandb"):
        wandb.teardown()  # its service lives until then
    if session.config.getoption("numprocesses", None):  # the workers have looked
        found = session.config.stash.get(_LEFT, {})
    else:
        found = left_over()
        for process, command in found.items():
            sys.__stderr__.write(f"left running by the tests: {process} {command}\n")
            os.kill(process, signal.SIGKILL)
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_running"] = found
    if found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """Collect the processes that a worker found running at its end."""
    found = getattr(node, "workeroutput", {}).get("left_running", {})
    node.config.stash.setdefault(_LEFT, {}).update(found)
