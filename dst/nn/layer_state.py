"""Loading, copying and pickling a sparse layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dst.nn.gradient_collector import GradientCollector
from dst.nn.row_copy import RowCopy
from dst.nn.saved_pattern import NAMES, flat_of_masked, flat_of_saved

if TYPE_CHECKING:
    from dst.nn.sparse_linear import SparseLinear

# Neither is changed in place, so copies share them.
_SHARED = ("_pattern", "_engine")


def derived_state() -> dict[str, Any]:
    """Return the initial values of the attributes that are neither copied nor pickled."""
    return {"_rows": RowCopy(), "_collector": GradientCollector(), "_prepared": None}


def load_pattern(
    layer: SparseLinear, state: Mapping[str, Any], prefix: str, missing: list[str], errors: list[str]
) -> dict[str, Any] | None:
    """Set the pattern of ``layer`` from a state_dict of a sparse layer or of a masked one.

    Args:
        layer: The layer. Its values are resized to the pattern.
        state: The state_dict.
        prefix: Prefix of the layer's entries.
        missing: Receives the names of missing entries of the pattern.
        errors: Receives the reason if the pattern does not fit or is damaged.

    Returns:
        The state_dict for ``nn.Module`` to load, without entries of the pattern. None after an error.
    """
    dense = state.get(f"{prefix}weight")
    if dense is not None and f"{prefix}values" not in state:
        return _load_masked(layer, state, prefix, errors)
    names = [prefix + name for name in NAMES]
    absent = [name for name in names if name not in state]
    missing.extend(absent)
    if not absent:
        pointers, rows = (state[name] for name in names)
        try:
            flat = flat_of_saved(pointers, rows, (layer.out_features, layer.in_features))
        except ValueError as error:
            errors.append(f"{prefix}row_indices: {error}")
            return None
        layer._set_pattern(layer._matrix_pattern(flat))
        if layer.values.numel() != layer.nnz:
            layer.values.grad = None
            layer.values.data = layer.values.data.new_zeros(layer.nnz)
    return {key: value for key, value in state.items() if key not in names}


def _load_masked(
    layer: SparseLinear, state: Mapping[str, Any], prefix: str, errors: list[str]
) -> dict[str, Any] | None:
    """Set the pattern to the non-zeros of a masked weight, and replace the weight by their values."""
    name = f"{prefix}weight"
    dense = state[name]
    if dense.shape != layer.shape:
        errors.append(f"{name}: saved with shape {tuple(dense.shape)}, this layer has shape {tuple(layer.shape)}")
        return None
    try:
        layer._set_pattern(layer._new_pattern(flat_of_masked(dense, layer.positions())))
    except ValueError as error:
        errors.append(f"{name}: {error}")
        return None
    rest = {key: value for key, value in state.items() if key != name}
    return {**rest, f"{prefix}values": layer.from_dense(dense)}


def copied(layer: SparseLinear, memo: dict[int, Any]) -> SparseLinear:
    """Return a deep copy of ``layer`` that shares what is immutable and derives the rest anew."""
    new = layer.__class__.__new__(layer.__class__)
    memo[id(layer)] = new
    derived = derived_state()
    for key, value in layer.__dict__.items():
        new.__dict__[key] = derived[key] if key in derived else value if key in _SHARED else copy.deepcopy(value, memo)
    return new


def pickled(layer: SparseLinear) -> dict[str, Any]:
    """Return the attributes to pickle, with flat indices in place of the pattern.

    pickle does not support uint16 tensors, and another machine may have another engine.
    """
    left_out = {"_engine", *derived_state()}
    kept = {key: value for key, value in layer.__dict__.items() if key not in left_out}
    return {**kept, "_pattern": layer.positions()}
