"""Finished runs as comparisons need them: numbers and settings by dotted name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dst.errors import DataError
from dst.report.summary import SUMMARY_FILE, leaves

# Settings that do not change what is compared, as prefixes of dotted names.
_NOT_SETTINGS = ("seed", "resume", "threads", "logger", "hydra", "data.root", "data.download", "trainer.enable_")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: The run's folder.
        method: Name of the method.
        seed: The run's seed.
        values: Numbers of the summary by dotted name; None where not finite.
        settings: Settings by dotted name, without the seed and those that do not change results.
    """

    folder: Path
    method: str
    seed: int
    values: Mapping[str, float | None]
    settings: Mapping[str, Any]


def read_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Read finished runs.

    Args:
        paths: Folders of runs, or folders that hold such at any depth.

    Returns:
        The runs, each once, in the order of the paths.

    Raises:
        DataError: A path holds no finished run, or a summary cannot be read.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        summaries = sorted(path.rglob(SUMMARY_FILE))
        if not summaries:
            raise DataError(f"there is no finished run in {path}: no {SUMMARY_FILE}")
        found.update(dict.fromkeys(summary.parent.resolve() for summary in summaries))
    return [_read(folder) for folder in found]


def _read(folder: Path) -> Run:
    path = folder / SUMMARY_FILE
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        method, seed = str(summary["sparsity"]), int(summary["seed"])
        values = {name: value for name, value in leaves(summary) if value is None or type(value) in (int, float)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is not a run's summary: {type(error).__name__} {error}") from error
    config = folder / ".hydra" / "config.yaml"
    settings: dict[str, Any] = {"density": summary.get("density", {}).get("target")}
    if config.is_file():
        try:
            loaded = OmegaConf.to_container(OmegaConf.load(config), resolve=False)
        except Exception as error:  # YAML and OmegaConf raise errors of several kinds
            raise DataError(f"{config} cannot be read: {str(error).splitlines()[0]}") from error
        if not isinstance(loaded, Mapping):
            raise DataError(f"{config} cannot be read: it holds no settings by name")
        named = {str(name): value for name, value in loaded.items()}
        settings = {name: value for name, value in leaves(named) if not name.startswith(_NOT_SETTINGS)}
    return Run(folder, method, seed, values, settings)
