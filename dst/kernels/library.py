"""The C interface of ``spmm.cpp``: its version, its functions and their argument types."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

ABI = 9
ISA = ("portable", "avx2", "avx512")
_SIGNATURES = {
    "dst_forward": [
        *[c_int, c_int, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int64],
        *[c_void_p, c_int64, c_int64, c_void_p, c_int, c_int],
    ],
    "dst_backward": [
        *[c_int, c_int, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int64],
        *[c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int],
    ],
    "dst_rows_forward": [
        *[c_int, c_int, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int64],
        *[c_void_p, c_int64, c_int64, c_void_p, c_int, c_void_p, c_int],
    ],
    "dst_rows_backward": [
        *[c_int, c_int, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int64],
        *[c_void_p, c_int64, c_void_p, c_int64, c_int, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int],
    ],
    "dst_gradient": [c_int, c_int64, c_int64, c_void_p, c_int64, c_int, c_void_p, c_int64, c_void_p, c_void_p, c_int],
    "dst_conv_forward": [c_int, c_int, *[c_void_p] * 7, c_int, c_int],
    "dst_conv_backward": [c_int, c_int, *[c_void_p] * 9, c_int],
    "dst_gather": [c_int, c_int64, c_void_p, c_void_p, c_void_p, c_int],
    "dst_transpose_pattern": [c_int, c_int64, c_int64, *[c_void_p] * 5],
    "dst_match_patterns": [c_int, c_int64, *[c_void_p] * 7],
    "dst_run_chain": [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64],
    "dst_flat": [c_int, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p],
    "dst_rewire_pattern": [
        *[c_int, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p],
        *[c_void_p] * 6,
    ],
    "dst_remap": [c_int, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int],
    "dst_cancel": [c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p],
    "dst_partition": [c_int, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p],
    "dst_grow_update": [c_int, c_void_p, c_int64, c_int64, c_void_p, *[c_int64] * 4, *[c_void_p] * 5],
    "dst_grow_finish": [c_int, c_int64, c_int64, c_void_p, c_void_p, c_void_p],
}
# These return 0, or 1 if they fail.
_FALLIBLE = (
    *("dst_run_chain", "dst_rows_forward", "dst_rows_backward", "dst_conv_forward", "dst_conv_backward"),
    "dst_rewire_pattern",
)


def open_library(path: Path) -> ctypes.CDLL:
    """Load the library at ``path`` and declare its functions.

    torch must be imported first. The kernels then use its OpenMP runtime and share its thread pool.

    Raises:
        OSError: The file cannot be loaded, or has another interface version.
    """
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "dst_abi") or library.dst_abi() != ABI:
        raise OSError(f"{path} was built from another version of the kernels; run python -m dst.kernels.build")
    for name, types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = types
        function.restype = c_int64 if name in _FALLIBLE else None
    return library
