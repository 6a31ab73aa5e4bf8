"""Compiling the sparse kernels. Uses only the standard library, so that an install can run it without torch.

``python -m dst.kernels.build`` builds the kernels into the package, for a source checkout.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).with_name("spmm.cpp")  # includes the others

# No -ffast-math: it breaks infinities and NaN. GCC's AVX-512 headers trigger the two uninitialized warnings.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-Wno-psabi",
)

# The translation units of the source, the slowest to compile first: one for each instruction set and element type.
UNITS = (
    *((f"-DDST_ONLY_LEVEL={level}", f"-DDST_ONLY_TYPE={kind}") for level in (2, 0, 1) for kind in ("float", "double")),
    ("-DDST_ONLY_ABI",),
)


class BuildError(RuntimeError):
    """There is no compiler, or compilation failed. The message contains the compiler's output."""


def find_compiler() -> str | None:
    """Return the path of the C++ compiler: ``$CXX`` if set, otherwise the first of c++, g++ and clang++, or None."""
    wanted = os.environ.get("CXX")
    for name in (wanted.split()[0],) if wanted else ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return found
    return None


def digest() -> str:
    """Return a short hash of the sources and the flags. It is part of the library's file name."""
    sources = b"".join(path.read_bytes() for path in sorted(SOURCE.parent.glob("*.cpp")))
    content = sources + " ".join(FLAGS).encode() + Path(__file__).read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


def cache_path() -> Path:
    """Return the path of a library built on first use, in ``$DST_CACHE`` or ``dst`` in the user's cache folder."""
    root = os.environ.get("DST_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dst"
    return base / f"spmm-{sys.platform}-{digest()}.so"


def build(target: Path, compiler: str | None = None) -> Path:
    """Compile the kernels into ``target``, with OpenMP if the compiler supports it.

    The library is written atomically, so several processes may build it at once.

    Args:
        target: The shared library to write. Missing folders are created.
        compiler: A C++ compiler with GCC's options; see `find_compiler` if None.

    Returns:
        ``target``.

    Raises:
        BuildError: There is no compiler, or compilation failed.
    """
    compiler = compiler or find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler found (looked for $CXX, c++, g++, clang++)")
    output = ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            partial = Path(folder) / target.name
            for openmp in (["-fopenmp"], []):
                output = _compile([compiler, *FLAGS, *openmp], partial)
                if not output:
                    os.replace(partial, target)  # not dst.checkpoints.replacing, which imports torch
                    return target
    except OSError as error:
        raise BuildError(f"cannot build the sparse kernels into {target.parent}: {error}") from error
    raise BuildError(f"{compiler} could not compile {SOURCE.name}:\n{output[-2000:]}")


def _compile(command: list[str], target: Path) -> str:
    """Compile the units in parallel and link them into ``target``; return what the compiler says if that fails."""
    objects = [target.with_name(f"{i}.o") for i in range(len(UNITS))]

    def run(*arguments: str | Path) -> str:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        return "" if done.returncode == 0 else done.stderr or f"exit status {done.returncode}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        errors = pool.map(lambda unit, path: run(*unit, "-c", SOURCE, "-o", path), UNITS, objects)
        output = next(filter(None, errors), "")
    return output or run("-shared", *objects, "-o", target)


if __name__ == "__main__":
    print(build(SOURCE.with_name("_spmm.so")))
