"""Checks of methods that are passed in, or come from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dst.errors import ConfigurationError, StateError
from dst.method.composition import Method
from dst.method.spec import spec_differences


def check_same(saved: Mapping[str, Any], method: Method) -> None:
    """Check that a checkpoint has the same method; its backend may differ.

    Args:
        saved: ``Method.spec()`` of the checkpoint.
        method: The present method.

    Raises:
        StateError: The methods differ.
    """
    if differences := spec_differences({**saved, "backend": method.backend}, method.spec()):
        raise StateError(f"the checkpoint is of another method ({'; '.join(differences)})")


def check_method(method: Any) -> None:
    """Raise ``ConfigurationError`` unless ``method`` is a ``Method``."""
    if isinstance(method, Method):
        return
    name = getattr(method, "__name__", None)
    if callable(method) and str(getattr(method, "__module__", "")).startswith("dst.methods"):
        raise ConfigurationError(f"dst.methods.{name} is a function that makes a method: call it, {name}(density=0.1)")
    raise ConfigurationError(f"{shown(method)} is not a method: pass one such as dst.methods.rigl(density=0.1)")


def shown(value: Any) -> str:
    """Return a value for an error message: its repr, shortened, and its type."""
    return "None" if value is None else f"{value!r:.60} ({type(value).__name__})"
