"""A run's report: one HTML file that needs no network, no script and no other file.

``data`` gathers what the run's folder holds, ``charts`` draws SVG, ``page`` puts them together.
"""

from __future__ import annotations

import os
from pathlib import Path

from dst.checkpoints import write_atomically
from dst.report.data import RunData, gather
from dst.report.page import render

REPORT_FILE = "report.html"

__all__ = ["REPORT_FILE", "RunData", "gather", "render", "write_report"]


def write_report(run: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Write a run's report.

    Args:
        run: The run's folder, finished or not.
        output: The HTML file; replaced in one move.

    Returns:
        The file.

    Raises:
        DataError: The folder holds no run, or a file in it that cannot be read.
    """
    page = render(gather(run))
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, page)
    return output
