"""Nothing outlives the suite; ``conftest.py`` looks when a session ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import conftest, leftovers

pytest_plugins = ["pytester"]


def test_a_child_that_stays_is_found_and_one_that_ended_is_not():
    before = leftovers.left_over()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        found = leftovers.left_over()
        assert found.keys() - before.keys() == {child.pid}
        assert "time.sleep(60)" in found[child.pid]
    finally:
        child.kill()
        child.wait()
    assert child.pid not in leftovers.left_over()


@pytest.mark.parametrize("workers", [pytest.param([], marks=pytest.mark.exhaustive), ["-n", "1"]])
def test_a_session_that_leaves_a_process_behind_fails(pytester, monkeypatch, workers):
    # The suite's own conftest.py has the same; it would import torch here.
    assert conftest.pytest_sessionfinish is leftovers.pytest_sessionfinish
    assert conftest.pytest_testnodedown is leftovers.pytest_testnodedown
    pytester.makeconftest("from tests.leftovers import pytest_sessionfinish, pytest_testnodedown")
    pytester.makepyfile(
        "import subprocess, sys\n"
        "def test_it():\n    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(20)'])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(pytester.path.__class__(__file__).parents[1]))
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *workers, timeout=100)
    assert result.ret != 0
    result.stderr.fnmatch_lines(["*left running*time.sleep(20)*"])
