"""Kernels for sparse weights: compiled ones if available, otherwise torch's CSR operations."""

from __future__ import annotations

import logging
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from dst.errors import ConfigurationError
from dst.kernels.chain import ChainLayer, CompiledChain
from dst.kernels.fallback import TorchKernels
from dst.kernels.geometry import ConvShape
from dst.kernels.layer import CompiledLayer
from dst.kernels.native import Kernels
from dst.kernels.pattern import Pattern
from dst.kernels.planes import ConvPlanes

__all__ = [
    "ChainLayer",
    "CompiledChain",
    "CompiledLayer",
    "ConvPlanes",
    "ConvShape",
    "Engine",
    "Kernels",
    "Pattern",
    "TorchKernels",
    "engine",
    "load",
]

Engine: TypeAlias = Kernels | TorchKernels

_log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def load() -> Kernels | None:
    """Return the compiled kernels, or None if there are none. The result is cached per process.

    Looks for the library that the install built, then for one in the user's cache folder, and otherwise builds it there
    in less than a minute. The environment variable ``DST_KERNELS`` overrides this: ``torch`` disables compiled kernels,
    ``prebuilt`` never runs a compiler, and a path selects the library to load.

    Raises:
        ConfigurationError: ``DST_KERNELS`` names a library that cannot be loaded.
    """
    # A module that is imported already triggers a warning in ``python -m dst.kernels.build``.
    from dst.kernels.build import BuildError, build, cache_path

    wanted = os.environ.get("DST_KERNELS", "")
    if wanted == "torch":
        return None
    if wanted not in ("", "prebuilt"):
        try:
            return Kernels(Path(wanted))
        except OSError as error:
            raise ConfigurationError(f"DST_KERNELS={wanted}: {error}") from error
    here = Path(__file__).parent
    for path in (*sorted(here.glob("_spmm*")), cache_path()):
        if path.suffix in (".so", ".dylib", ".dll", ".pyd") and path.exists():
            try:
                return Kernels(path)
            except OSError as error:
                _log.info("skipping %s: %s", path, error)
    if wanted == "prebuilt":
        return None
    try:
        _log.info("building the sparse kernels once, into %s", cache_path())
        return Kernels(build(cache_path()))
    except (BuildError, OSError) as error:
        _log.info("no compiled kernels: %s", error)
        return None


@lru_cache(maxsize=1)
def engine() -> Engine:
    """Return the engine of sparse layers: the compiled kernels, or torch's CSR operations with a warning."""
    kernels = load()
    if kernels is not None:
        return kernels
    warnings.warn(
        "dst: no compiled sparse kernels here; using torch's CSR operations, about half as fast. Install a C++ "
        "compiler (g++ or clang++) and run python -m dst.kernels.build.",
        RuntimeWarning,
        stacklevel=2,
    )
    return TorchKernels()
