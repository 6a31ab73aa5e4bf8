"""One run: from a configuration to a trained sparse network and its summary."""

from __future__ import annotations

import os
import time
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from dst.cli.build import build
from dst.cli.checks import check_launcher
from dst.cli.fit import fit
from dst.cli.loggers import MetricsFile, chosen_logger, quieten_lightning
from dst.cli.objects import make, naming
from dst.cli.results import summarise, write_results
from dst.cli.resume import finished_summary, resume_point
from dst.errors import ConfigurationError
from dst.lightning.progress import Progress
from dst.metrics.prediction import Prediction
from dst.report.summary import Summary


def run(cfg: DictConfig, folder: str | os.PathLike[str], *, sweep: bool = False) -> Summary:
    """Train and test what a configuration describes.

    Everything is built and checked before anything is written. Then the folder gets ``checkpoints/``, ``metrics.csv`` and
    ``topology.jsonl`` and, at the end, ``summary.json`` and ``report.html``.

    Args:
        cfg: The composed ``conf/train.yaml``.
        folder: The run's folder.
        sweep: Whether the run is one of several in one command.

    Returns:
        The content of ``summary.json``.

    Raises:
        ConfigurationError: A setting, or a combination of settings, that cannot be trained; data that is missing.
        StateError: A checkpoint to resume from that belongs to another run.
    """
    folder = Path(folder)
    quieten_lightning()
    parts = build(cfg)
    batch_size = int(cfg.data.get("batch_size", 1))
    _set_threads(cfg.threads, sum(parts.operations.macs.values()) * batch_size)
    resume = resume_point(cfg.resume, folder, parts.method)
    trial = _trainer(cfg, folder, [], [], "")  # a trainer that cannot be built fails here, before anything is written
    if sweep:
        check_launcher(trial.strategy.launcher)
    with naming("model"):
        prediction = Prediction(parts.module, parts.example, batch_size, parts.layers)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with chosen_logger(cfg, folder) as chosen:

        def make_trainer(callbacks: list[Callback], metrics: MetricsFile, title: str) -> lightning.Trainer:
            return _trainer(cfg, folder, callbacks, [metrics, *chosen], title)

        outcome = fit(parts, cfg, folder, resume, make_trainer)
        if not outcome.trained and (found := finished_summary(folder, outcome.steps)) is not None:
            return found
        trainer = outcome.trainer
        (tested,) = trainer.test(parts.module, datamodule=parts.datamodule, verbose=False)
        seconds = time.perf_counter() - began + outcome.seconds_before
        summary = summarise(parts, cfg, outcome, prediction, tested, seconds)
        for target in trainer.loggers:
            target.log_metrics(summary.scalars(), step=trainer.global_step)
    if trainer.is_global_zero:
        write_results(summary, folder, report=cfg.report)
    return summary


def _trainer(
    cfg: DictConfig, folder: Path, callbacks: list[Callback], loggers: list[Logger], title: str
) -> lightning.Trainer:
    if cfg.trainer.enable_progress_bar:
        callbacks = [*callbacks, Progress(title)]
    return make(cfg.trainer, callbacks=callbacks, logger=loggers, default_root_dir=folder)


def _set_threads(threads: int | None, macs: int) -> None:
    """Set PyTorch's CPU threads. Small batches of small networks take one: more would only wait for each other."""
    if threads is not None and threads < 1:
        raise ConfigurationError(f"threads={threads} must be at least 1, or null")
    if threads is not None or macs < 2**26:
        torch.set_num_threads(threads or 1)
