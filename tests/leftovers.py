"""What tests leave running: nothing."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path


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
    """The children of this process that nobody has ended, without multiprocessing's own book-keeper."""
    multiprocessing.active_children()  # collects those that have ended
    return {p: c for p, c in children().items() if c and "resource_tracker" not in c and "semaphore_tracker" not in c}
