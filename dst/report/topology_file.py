"""``topology.jsonl``: the layers of a run over time, one JSON object per line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

TOPOLOGY_FILE = "topology.jsonl"


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a recording. A damaged line, such as a last line that was cut off, and all lines after it are left out.

    Args:
        path: The file. A missing file has no rows.

    Returns:
        The rows in order.
    """
    path = Path(path)
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict):
                break
            rows.append(row)
    return rows
