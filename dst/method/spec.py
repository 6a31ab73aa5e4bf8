"""Specs: a method as nested plain values, and how two of them differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Return a piece or setting as plain values: dataclasses become mappings with their public path as ``_target_``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}
        return {"_target_": public_path(type(value)), **fields}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()  # torch.load with weights_only=True refuses numpy's scalars
    return value


def public_path(kind: type) -> str:
    """Return the path by which users import a class of ``dst.pieces`` or ``dst.method``, whichever module defines it."""
    module = kind.__module__
    if module.startswith("dst.pieces."):
        module = f"dst.{module.split('.')[2]}"
    elif module.startswith("dst.method."):
        module = "dst.method"
    return f"{module}.{kind.__qualname__}"


def spec_differences(saved: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Describe how two specs differ, one line per field: ``density: 0.1 in the checkpoint, 0.2 here``.

    Args:
        saved: Spec of a checkpoint.
        here: Spec of the present method.
        prefix: Path of the specs in the method's, with a trailing dot.
    """
    lines: list[str] = []
    for key in dict.fromkeys([*saved, *here]):
        a, b = saved.get(key), here.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping) and a.get("_target_") == b.get("_target_"):
            lines += spec_differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {_short(a)} in the checkpoint, {_short(b)} here")
    return lines


def _short(value: Any) -> Any:
    """Return a piece's class name, any other value as it is."""
    return value["_target_"].rpartition(".")[2] if isinstance(value, Mapping) and "_target_" in value else value
