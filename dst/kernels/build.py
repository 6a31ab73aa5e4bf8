"""Compile the sparse kernels; needs nothing but the standard library, so that an install can use it before torch exists.

``python -m dst.kernels.build`` builds them into the package, for a source checkout.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("spmm.cpp")
INCLUDED = (Path(__file__).with_name("conv.cpp"),)

# No -ffast-math: infinities and NaN must survive. GCC's own AVX-512 headers trigger the two warnings silenced here.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-Wno-psabi",
)


class BuildError(RuntimeError):
    """No compiler was found, or it refused the source; the message holds what it said."""


def find_compiler() -> str | None:
    """Return the C++ compiler's path: ``$CXX`` if set, otherwise the first of c++, g++ and clang++, or None."""
    wanted = os.environ.get("CXX")
    for name in (wanted.split()[0],) if wanted else ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return found
    return None


def digest() -> str:
    """Return a short hash of the sources and the flags: a library built from anything else is another file."""
    sources = b"".join(path.read_bytes() for path in (SOURCE, *INCLUDED))
    content = sources + " ".join(FLAGS).encode() + Path(__file__).read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


def cache_path() -> Path:
    """Return where a library built on first use belongs: ``$DST_CACHE``, or ``dst`` in the user's cache folder."""
    root = os.environ.get("DST_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dst"
    return base / f"spmm-{sys.platform}-{digest()}.so"


def build(target: Path, compiler: str | None = None) -> Path:
    """Compile the kernels into ``target``, with OpenMP where the compiler has it.

    The library appears under its name only when it is complete, so that several processes may build at once.

    Args:
        target: the shared library to write; its folder is created.
        compiler: a C++ compiler that speaks GCC's options; found by itself if None.

    Returns:
        ``target``.

    Raises:
        BuildError: no compiler, or the compilation failed.
    """
    compiler = compiler or find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler found (looked for $CXX, c++, g++, clang++)")
    said = ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            partial = Path(folder) / target.name
            for openmp in (["-fopenmp"], []):
                command = [compiler, *FLAGS, *openmp, str(SOURCE), "-o", str(partial)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode == 0:
                    os.replace(partial, target)
                    return target
                said = done.stderr
    except OSError as error:
        raise BuildError(f"cannot build the sparse kernels into {target.parent}: {error}") from error
    raise BuildError(f"{compiler} could not compile {SOURCE.name}:\n{said[-2000:]}")


if __name__ == "__main__":
    print(build(SOURCE.with_name("_spmm.so")))
