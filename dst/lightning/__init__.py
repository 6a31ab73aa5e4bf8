"""Sparse training under Lightning.

``SparseTraining`` is the callback that trains sparsely, ``Recorder`` one beside it that writes the topology's course, and
``run_lottery`` drives the several fits of lottery tickets.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dst.lightning.callback import SparseTraining
    from dst.lightning.checkpoint_io import AtomicCheckpointIO
    from dst.lightning.lottery_levels import run_lottery
    from dst.lightning.recorder import Recorder

_NAMES = {
    "AtomicCheckpointIO": "dst.lightning.checkpoint_io",
    "Recorder": "dst.lightning.recorder",
    "SparseTraining": "dst.lightning.callback",
    "run_lottery": "dst.lightning.lottery_levels",
}

__all__ = ["AtomicCheckpointIO", "Recorder", "SparseTraining", "run_lottery"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: the callback needs nothing of what writes reports."""
    if name not in _NAMES:
        raise AttributeError(f"module 'dst.lightning' has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
