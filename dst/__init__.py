"""dst: dynamic sparse training for PyTorch.

Networks whose weights are mostly zero from the first step, with connections that move to where they help.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dst import (
        allocation,
        amounts,
        data,
        init,
        lightning,
        methods,
        metrics,
        models,
        nn,
        patterns,
        redistribute,
        relaxations,
        schedules,
        scores,
        types,
    )
    from dst.backends import dense_optimizer_state, dense_state_dict, prepare, sparse_optimizer_state, to_dense
    from dst.dry_run import Plan, plan
    from dst.errors import ConfigurationError, DataError, StateError
    from dst.mask_file import load_masks, save_masks
    from dst.method import Method
    from dst.sparsifier import Sparsifier

__version__ = "0.1.0"

_NAMES = {
    "ConfigurationError": "dst.errors",
    "DataError": "dst.errors",
    "Method": "dst.method",
    "Plan": "dst.dry_run",
    "Sparsifier": "dst.sparsifier",
    "StateError": "dst.errors",
    "dense_optimizer_state": "dst.backends",
    "dense_state_dict": "dst.backends",
    "load_masks": "dst.mask_file",
    "plan": "dst.dry_run",
    "prepare": "dst.backends",
    "save_masks": "dst.mask_file",
    "sparse_optimizer_state": "dst.backends",
    "to_dense": "dst.backends",
}

__all__ = [
    "ConfigurationError",
    "DataError",
    "Method",
    "Plan",
    "Sparsifier",
    "StateError",
    "allocation",
    "amounts",
    "data",
    "dense_optimizer_state",
    "dense_state_dict",
    "init",
    "lightning",
    "load_masks",
    "methods",
    "metrics",
    "models",
    "nn",
    "patterns",
    "plan",
    "prepare",
    "redistribute",
    "relaxations",
    "save_masks",
    "schedules",
    "scores",
    "sparse_optimizer_state",
    "to_dense",
    "types",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `dst --help` needs no torch, and a plain loop no Lightning."""
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    if name in __all__:
        return importlib.import_module(f"dst.{name}")
    raise AttributeError(f"module 'dst' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return [*__all__, "__version__"]
