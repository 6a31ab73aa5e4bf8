"""What reads a run's folder: the report, comparisons, and the inspection of checkpoints.

A report is one HTML file that needs no network, no script and no other file. ``data`` reads the run's folder, ``charts``
draws SVG, ``figures`` has the values that a page consists of, ``page`` makes the sections, and ``templates`` has the HTML.
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
        run: The run's folder. The run need not be finished.
        output: The HTML file. An older one is replaced atomically.

    Returns:
        Path of the HTML file.

    Raises:
        DataError: The folder holds no run, or a file in it cannot be read.
    """
    page = render(gather(run))
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, page)
    return output
