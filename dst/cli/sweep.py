"""Folders of runs and sweeps: removed if no run began, and summarised in one table when a sweep ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from rich.text import Text

from dst.checkpoints import write_atomically
from dst.errors import ConfigurationError
from dst.report.summary import SUMMARY_FILE, Summary, number, percent
from dst.report.terminal import show, terminal_table
from dst.tables import csv_table, markdown_table

CONFIG_FILE = "finished.yaml"
ERROR_FILE = "error.txt"
OVERRIDES_FILE = ".hydra/overrides.yaml"


class Folders(Callback):
    """Hydra callback that remembers the previous content of a folder, and writes the table of a sweep."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember the content of the run's folder."""
        Before.remember(config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember the content of the sweep's folder."""
        Before.remember(config.hydra.sweep.dir)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write ``sweep.csv`` and ``sweep.md``, print the table, and exit with status 1 if a run failed."""
        rows = collect(config.hydra.sweep.dir)
        if not rows:
            return
        write_table(rows, config.hydra.sweep.dir)
        show(table(rows, title=str(config.hydra.sweep.dir)))
        if any(row.status != "ok" for row in rows):
            # Hydra turns an Exception into a warning, and the command would succeed.
            sys.exit(1)


@dataclass(frozen=True)
class Before:
    """The content of a folder before a command: its paths, and the bytes of files that Hydra overwrites."""

    folder: Path
    content: dict[Path, bytes | None]

    @classmethod
    def remember(cls, folder: str) -> None:
        """Read a folder, which need not exist."""
        global _before
        root = Path(folder).absolute()
        _before = cls(
            root,
            {path: path.read_bytes() if _is_hydras(path) else None for path in root.rglob("*")},
        )

    def restore(self) -> None:
        """Remove all new files and then empty parent folders. Restore overwritten files."""
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path not in self.content:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        for path, content in self.content.items():
            if content is not None:
                path.write_bytes(content)
        for folder in (self.folder, *self.folder.parents):
            if folder in (Path.cwd(), *Path.cwd().parents) or not folder.is_dir() or any(folder.iterdir()):
                break
            folder.rmdir()


_before: Before | None = None


def discard() -> None:
    """Undo what this command wrote, unless there is a checkpoint to resume from."""
    global _before
    if _before is not None:
        folder = _before.folder
        if not any(path not in _before.content for path in folder.rglob("*.ckpt")):
            _before.restore()
        _before = None


def _is_hydras(path: Path) -> bool:
    return path.is_file() and (path.parent.name == ".hydra" or path.name in ("train.log", "multirun.yaml"))


def finished(folder: Path, cfg: DictConfig) -> Summary | None:
    """Return the summary of a run that an earlier sweep in the same folder has finished, or ``None``.

    Raises:
        ConfigurationError: The folder holds the results of a run with other settings.
    """
    record = folder / CONFIG_FILE
    if not record.is_file() or not (folder / SUMMARY_FILE).is_file():
        return None
    if record.read_text(encoding="utf-8") != _settings(cfg):
        raise ConfigurationError(
            f"{folder} holds the results of a run with other settings: repeat the sweep's own command, "
            "or choose another hydra.sweep.dir"
        )
    return Summary.read(folder)


def mark_finished(folder: Path, cfg: DictConfig) -> None:
    """Record the settings of a finished run, so that a repeated sweep recognises it."""
    write_atomically(folder / CONFIG_FILE, _settings(cfg))


def _settings(cfg: DictConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "resume"]), resolve=True)


@dataclass(frozen=True)
class Row:
    """One run of a sweep.

    Attributes:
        run: Its folder's name.
        overrides: Setting to value, as given on the command line.
        status: ``ok``, ``failed: <message>`` or ``unfinished``.
        values: Column to number, from ``summary.json``; empty without one.
    """

    run: str
    overrides: dict[str, str]
    status: str
    values: dict[str, float | None]


COLUMNS = {
    "realised_density": ("density", "realised"),
    "accuracy": ("test", "accuracy"),
    "loss": ("test", "loss"),
    "inference_ratio": ("flops", "inference_ratio"),
    "training_ratio": ("flops", "training_ratio"),
    "seconds": ("seconds",),
}


def collect(folder: str | Path) -> list[Row]:
    """Read all runs in a sweep's folder, in the order in which they were launched."""
    runs = [path.parent.parent for path in Path(folder).rglob(OVERRIDES_FILE)]
    return [_row(path, Path(folder)) for path in sorted(runs, key=lambda p: (len(str(p)), str(p)))]


def _row(path: Path, folder: Path) -> Row:
    parsed = OverridesParser.create().parse_overrides(list(OmegaConf.load(path / OVERRIDES_FILE)))
    overrides = {override.get_key_element(): override.get_value_element_as_str() for override in parsed}
    summary = {}
    if (path / ERROR_FILE).exists():
        status = "failed: " + (path / ERROR_FILE).read_text(encoding="utf-8").partition("\n")[0]
    elif (path / SUMMARY_FILE).exists():
        status, summary = "ok", json.loads((path / SUMMARY_FILE).read_text(encoding="utf-8"))
    else:
        status = "unfinished"
    values = {name: _select(summary, keys) for name, keys in COLUMNS.items()} if summary else {}
    return Row(str(path.relative_to(folder)), overrides, status, values)


def _select(summary: Any, keys: Sequence[str]) -> float | None:
    for key in keys:
        summary = summary[key]
    return summary


def swept(rows: Sequence[Row]) -> list[str]:
    """Return the settings that differ between runs, in the order of the command line; all if none does."""
    names = list(dict.fromkeys(name for row in rows for name in row.overrides))
    return [name for name in names if len({row.overrides.get(name) for row in rows}) > 1] or names


def write_table(rows: Sequence[Row], folder: str | Path) -> None:
    """Write all runs to ``sweep.csv`` (every override, full precision) and ``sweep.md`` (what was swept)."""
    names = list(dict.fromkeys(name for row in rows for name in row.overrides))
    lines: list[list[Any]] = [["run", *names, *COLUMNS, "status"]]
    for row in rows:
        given = [row.overrides.get(name, "") for name in names]
        lines.append([row.run, *given, *(row.values.get(name) for name in COLUMNS), row.status])
    write_atomically(Path(folder) / "sweep.csv", csv_table(lines))
    header, cells = _cells(rows)
    write_atomically(Path(folder) / "sweep.md", markdown_table([header, *cells], _measured(header)) + "\n")


def table(rows: Sequence[Row], title: str = "") -> Table:
    """Return all runs as a ``rich`` table."""
    header, lines = _cells(rows)
    styles = ["" if line[-1] == "ok" else "red" for line in lines]
    styled = [[Text(cell, style) for cell in line] for line, style in zip(lines, styles, strict=True)]
    return terminal_table([header, *styled], _measured(header), title=title)


_SHOWN = {
    "realised density": lambda row: number(row.values["realised_density"]),
    "test accuracy": lambda row: percent(row.values["accuracy"]),
    "inference FLOPs": lambda row: percent(row.values["inference_ratio"]),
    "training FLOPs": lambda row: percent(row.values["training_ratio"]),
    "seconds": lambda row: f"{row.values['seconds']:.1f}",
}


def _measured(header: Sequence[str]) -> list[int]:
    return [i for i, name in enumerate(header) if name in _SHOWN]


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    names = swept(rows)
    header = ["run", *names, *_SHOWN, "status"]
    lines = []
    for row in rows:
        measured = [text(row) if row.values else "" for text in _SHOWN.values()]
        lines.append([row.run, *(row.overrides.get(n, "") for n in names), *measured, row.status])
    return header, lines
