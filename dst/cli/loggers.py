"""Where a run's metrics go: ``metrics.csv`` in its folder, and the logger that the configuration chooses."""

from __future__ import annotations

import csv
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from dst.cli.objects import make
from dst.cli.resume import load_fit


class MetricsFile(CSVLogger):
    """``metrics.csv`` in the run's folder. A resumed run keeps the rows up to its checkpoint.

    Args:
        folder: The run's folder.
        resume: Checkpoint that training resumes from, if it exists; rows after its step are dropped.
        level: Number of the fit, for a run of several; it becomes a column, and rows of other fits stay.
    """

    def __init__(self, folder: Path, *, resume: Path | None = None, level: int | None = None) -> None:
        self._extra = {} if level is None else {"level": level}
        kept = _rows_before(folder / "metrics.csv", resume, level)
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=1)
        if kept:
            self.experiment.metrics.extend(kept)
            self.save()

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row; ``step`` is the number of optimizer steps taken."""
        super().log_metrics({**metrics, **self._extra}, None if step is None else int(step))


def _rows_before(path: Path, resume: Path | None, level: int | None) -> list[dict[str, Any]]:
    if not path.exists() or (level is None and resume is None):
        return []
    step = load_fit(resume)["global_step"] if resume is not None and resume.exists() else -1
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if (level is not None and int(row["level"]) != level) or int(row["step"]) <= step]


@contextmanager
def chosen_logger(cfg: DictConfig, folder: Path) -> Iterator[list[Logger]]:
    """Open the logger that ``logger=`` chooses, send it the run's settings, and close it at the end.

    Yields:
        A list of the logger; empty where ``metrics.csv`` is the only one.
    """
    logger = make(cfg.logger, save_dir=folder)
    if logger is None:
        yield []
        return
    try:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
        yield [logger]
    finally:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()  # otherwise the next run of a sweep continues this one


def quieten_lightning() -> None:
    """Silence Lightning's messages about itself; warnings about training stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*logs directory .* exists and is not empty.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*is smaller than the logging interval.*",
        ".*but have no `val_dataloader`.*",
        ".*It is recommended to use .*sync_dist=True.*",  # the metrics are reduced already
        ".*isinstance\\(treespec, LeafSpec\\).*",
    ):
        warnings.filterwarnings("ignore", message=message)
