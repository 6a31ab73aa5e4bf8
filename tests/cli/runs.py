"""Configurations of quick runs, and what two runs that agree have in common."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from dst.cli import main as cli
from dst.report.summary import Summary

MACHINE = ("seconds", "memory", "latency", "energy")
"""Parts of a summary that are measured, and differ from run to run."""


QUICK = ("trainer.enable_progress_bar=false", "trainer.accelerator=cpu")


def composed(*overrides: str) -> Any:
    """``train``'s configuration, on the CPU, without a progress bar, with overrides."""
    cli.register_schema()
    with initialize_config_dir(str(cli.config_dir()), version_base="1.3"):
        return compose("train", [*QUICK, *overrides])


def metrics(folder: Path) -> list[dict[str, str]]:
    """All rows but those about topology, which a resume repeats once, without what the machine measured."""
    measured = tuple(f"summary/{part}." for part in MACHINE)
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if value and not name.startswith(measured)}
            for row in csv.DictReader(file)
            if not row.get("topology/updates")
        ]


def without_time(summary: Summary) -> dict[str, Any]:
    """A summary's fields without what the machine measured."""
    return {name: value for name, value in vars(summary).items() if name not in MACHINE}
