"""dst: dynamic sparse training for PyTorch.

Trains networks that are sparse from the first step, and updates their topology during training.

Training:

- `Sparsifier`: makes a model sparse and updates its topology during training.
- `Method`: a composition of pieces; `methods` has the published ones.
- `plan`, `Plan`: the dry run of a method on a model.
- `lightning`: the callback for Lightning's ``Trainer``. Needs lightning.

Backends and files:

- `prepare`, `to_dense`: swap a model's layers for sparse ones before training, and back.
- `dense_state_dict`, `dense_optimizer_state`, `sparse_optimizer_state`: convert saved states between backends.
- `save_masks`, `load_masks`: mask files.

Pieces of a method:

- `allocation`: how the budget is split over layers.
- `amounts`: how many weights an update drops.
- `init`: how the first mask is chosen.
- `patterns`: which weights share one bit of the mask.
- `perturbations`: additions to the gradients of active weights.
- `redistribute`: moving budget between layers.
- `relaxations`: how effective weights follow from latent weights.
- `schedules`: clocks, density schedules and fraction schedules.
- `scores`: drop scores and grow scores.
- `types`: the protocols of all pieces, for writing new ones.

Networks, data and measuring:

- `nn`: sparse layers, sparse activations, mixtures of experts.
- `models`: small models.
- `data`: small data sets as Lightning data modules. Needs lightning.
- `metrics`: FLOPs, memory and diagnostics.

Errors:

- `ConfigurationError`, `DataError`, `StateError`.

The core needs only torch and numpy. Names are imported on first use.
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
    """Import a public name on first use: `dst --help` needs no torch, and a plain loop no Lightning."""
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    if name in __all__:
        try:
            return importlib.import_module(f"dst.{name}")
        except ModuleNotFoundError as error:
            from dst.errors import missing_package

            raise missing_package(f"dst.{name}", error) from error
    raise AttributeError(f"module 'dst' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return [*__all__, "__version__"]
