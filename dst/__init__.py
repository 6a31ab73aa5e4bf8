"""dst: dynamic sparse training for PyTorch.

Networks whose weights are mostly zero from the first step, with connections that move to where they help.
"""

from __future__ import annotations

from dst import methods
from dst.backends import dense_optimizer_state, dense_state_dict, prepare, sparse_optimizer_state, to_dense
from dst.errors import ConfigurationError, DataError, StateError
from dst.mask_file import load_masks, save_masks
from dst.method import Method
from dst.plan import Plan, plan
from dst.sparsifier import Sparsifier

__version__ = "0.1.0"

__all__ = [
    "ConfigurationError",
    "DataError",
    "Method",
    "Plan",
    "Sparsifier",
    "StateError",
    "dense_optimizer_state",
    "dense_state_dict",
    "load_masks",
    "methods",
    "plan",
    "prepare",
    "save_masks",
    "sparse_optimizer_state",
    "to_dense",
]
