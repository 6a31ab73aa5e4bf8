"""A process that saves checkpoints until it is killed; it imports no more than it needs."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from dst.checkpoints import save_atomically


def each_in_a_fork(folder: Path, functions: list[str]) -> None:
    """Call ``save_twice_and_die`` for each function in a process of its own, and leave how each ended."""
    for function in functions:
        (folder / function).mkdir()
        child = os.fork()  # of a process without threads, so that torch is imported once
        if child == 0:
            save_twice_and_die(folder / function / "last.ckpt", function)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (folder / f"{function}.code").write_text(str(code))


def save_twice_and_die(path: Path, function: str) -> None:
    """Save a checkpoint, and be killed within the saving of another as ``os.<function>`` is called."""
    save_atomically({"attempt": 1, "payload": torch.zeros(1000)}, path)

    def die(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, function, die)
    save_atomically({"attempt": 2, "payload": torch.zeros(1000)}, path)
