"""What a process of its own does until it is killed; it imports no more than it needs."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from dst.checkpoints import save_atomically


def save_twice_and_die(path: Path, function: str) -> None:
    """Save a checkpoint, and be killed within the saving of another as ``os.<function>`` is called."""
    save_atomically({"attempt": 1, "payload": torch.zeros(1000)}, path)

    def die(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, function, die)
    save_atomically({"attempt": 2, "payload": torch.zeros(1000)}, path)
