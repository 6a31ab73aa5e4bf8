"""Old names of modules that have moved. They still import, so scripts and YAML files keep working."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "dst.classifier": "dst.models.classifier",
    "dst.compare": "dst.report.compare",
    "dst.distributed": "dst.engine.gradient_compression",
    "dst.dry_run": "dst.engine.dry_run",
    "dst.inspection": "dst.report.inspection",
    "dst.layers": "dst.topology.layers",
    "dst.lottery": "dst.engine.lottery",
    "dst.lottery_run": "dst.lightning.lottery_levels",
    "dst.mask_file": "dst.topology.mask_file",
    "dst.recording": "dst.lightning.recorder",
    "dst.run": "dst.cli.train",
    "dst.sparsifier": "dst.engine.sparsifier",
    "dst.summary": "dst.report.summary",
    "dst.sweep": "dst.cli.sweep",
}
"""Old module name to new module name."""


class _Redirect(MetaPathFinder, Loader):
    """Imports a module under its new name when its old name is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, _Redirect()) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(MOVED[spec.name])
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Keep the spec of the new name: the module has already been executed under it."""
        module.__spec__ = self._spec


def install() -> None:
    """Make the old names importable."""
    if not any(isinstance(finder, _Redirect) for finder in sys.meta_path):
        sys.meta_path.append(_Redirect())
