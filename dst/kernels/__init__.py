"""Kernels that touch only non-zero weights: compiled where possible, torch's own CSR operations otherwise."""

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
from dst.kernels.native import Kernels
from dst.kernels.pattern import Pattern

__all__ = ["ChainLayer", "CompiledChain", "ConvShape", "Engine", "Kernels", "Pattern", "TorchKernels", "engine", "load"]

Engine: TypeAlias = Kernels | TorchKernels

_log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def load() -> Kernels | None:
    """Return the compiled kernels, or None where there are none; asked once per process.

    The library that the install built comes first, then one built earlier on this machine; otherwise it is built now
    (under a minute) into the user's cache folder. ``DST_KERNELS`` overrides: ``torch`` refuses compiled kernels,
    ``prebuilt`` never runs a compiler, and a path names the library to load.

    Raises:
        ConfigurationError: ``DST_KERNELS`` names a library that cannot be loaded.
    """
    # Imported here so that ``python -m dst.kernels.build`` is the first to import it.
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
    """Return the engine for sparse layers: the compiled kernels, or torch's CSR operations after saying so once."""
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
