"""Puts the configuration files into the built package, and builds the sparse kernels where there is a C++ compiler."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CONF = Path(__file__).parent / "conf"
KERNELS = Path(__file__).parent / "dst" / "kernels"


class BuildWithConf(build_py):
    """Copies ``conf/`` to ``dst/conf``; an editable install reads the checkout's own."""

    def run(self) -> None:
        """Build the package and copy the configuration."""
        super().run()
        if not self.editable_mode:
            for source, target in self._files().items():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def get_source_files(self) -> list[str]:
        """List what belongs into a source distribution, relative to this file."""
        return super().get_source_files() + [str(path.relative_to(CONF.parent)) for path in self._files()]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """List the files that a build writes."""
        return super().get_outputs(include_bytecode) + [str(path) for path in self._files().values()]

    def _files(self) -> dict[Path, Path]:
        target = Path(self.build_lib) / "dst" / "conf"
        return {path: target / path.relative_to(CONF) for path in sorted(CONF.rglob("*.yaml"))}


class BuildKernels(build_ext):
    """Compiles ``spmm.cpp`` with the package's own builder: it is no Python module and needs no Python headers."""

    def build_extension(self, ext: Extension) -> None:
        """Write the library where setuptools expects the extension, or warn and leave it out."""
        builder = runpy.run_path(str(KERNELS / "build.py"))
        try:
            builder["build"](Path(self.get_ext_fullpath(ext.name)).resolve())
        except builder["BuildError"] as error:
            self.warn(f"sparse kernels not built, torch's CSR operations will serve: {error}")


setup(
    ext_modules=[
        Extension(
            "dst.kernels._spmm",
            ["dst/kernels/spmm.cpp"],
            depends=["dst/kernels/rows.cpp", "dst/kernels/conv.cpp", "dst/kernels/update.cpp"],
            optional=True,
        )
    ],
    cmdclass={"build_py": BuildWithConf, "build_ext": BuildKernels},
)
