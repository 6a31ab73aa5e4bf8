"""dst: dynamic sparse training for PyTorch.

Networks whose weights are mostly zero from the first step, with connections that move to where they help.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dst import moved as _moved

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
        perturbations,
        redistribute,
        relaxations,
        schedules,
        scores,
        types,
    )
    from dst.backends import dense_optimizer_state, dense_state_dict, prepare, sparse_optimizer_state, to_dense
    from dst.engine.dry_run import Plan, plan
    from dst.engine.sparsifier import Sparsifier
    from dst.errors import ConfigurationError, DataError, StateError
    from dst.method import Method
    from dst.topology.mask_file import load_masks, save_masks

__version__ = "0.1.0"

_moved.install()

_NAMES = {
    "ConfigurationError": "dst.errors",
    "DataError": "dst.errors",
    "Method": "dst.method",
    "Plan": "dst.engine.dry_run",
    "Sparsifier": "dst.engine.sparsifier",
    "StateError": "dst.errors",
    "dense_optimizer_state": "dst.backends",
    "dense_state_dict": "dst.backends",
    "load_masks": "dst.topology.mask_file",
    "plan": "dst.engine.dry_run",
    "prepare": "dst.backends",
    "save_masks": "dst.topology.mask_file",
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
    "perturbations",
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
