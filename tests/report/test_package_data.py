"""The files beside the code are part of what is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dst.report.templating import TEMPLATES

ROOT = Path(__file__).parents[2]


def test_a_built_package_has_the_templates(tmp_path):
    if not (ROOT / "setup.py").exists():
        pytest.skip("no checkout")
    (tmp_path / "info").mkdir()
    built = subprocess.run(
        [sys.executable, "setup.py", "egg_info", "--egg-base", str(tmp_path / "info"), "build_py", "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    names = {path.name for path in TEMPLATES.iterdir()}
    assert {"report.html", "comparison.html", "style.css"} <= names
    assert {path.name for path in (tmp_path / "lib" / "dst" / "report" / "templates").iterdir()} == names
    assert (tmp_path / "lib" / "dst" / "py.typed").exists()
    listed = (tmp_path / "info" / "dst.egg-info" / "SOURCES.txt").read_text().splitlines()  # what an sdist holds
    assert {f"dst/report/templates/{name}" for name in names} <= set(listed)
