"""Sparse training under Lightning.

``SparseTraining`` is the callback that trains sparsely. ``Recorder`` is a callback that records the topology over time.
``run_lottery`` runs the fits of a lottery ticket.
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
    """Import a public name on first use, so that the callback does not import the modules of reports."""
    if name not in _NAMES:
        raise AttributeError(f"module 'dst.lightning' has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return list(__all__)
