"""Training: one ordinary fit, or one fit for each level of a lottery ticket, and what is left of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from omegaconf import DictConfig
from torch import Tensor

from dst.cli.build import Parts
from dst.cli.loggers import MetricsFile
from dst.cli.resume import LAST, level_seconds
from dst.errors import ConfigurationError
from dst.lightning.best_checkpoint import BestCheckpoint
from dst.lightning.callback import SparseTraining
from dst.lightning.lottery_levels import run_lottery
from dst.lightning.recorder import Recorder
from dst.lightning.spent import Spent
from dst.metrics.energy import Energy, sum_energy
from dst.metrics.memory import PeakMemory
from dst.metrics.meter import FlopsMeter, TrainingFlops
from dst.report.summary import Topology

logger = logging.getLogger(__name__)

TrainerFactory: TypeAlias = "Callable[[list[Callback], MetricsFile, str], lightning.Trainer]"
"""Builds the trainer of one fit from callbacks, its metrics file and the title of its progress bar."""


@dataclass(frozen=True)
class Outcome:
    """What training leaves behind.

    Attributes:
        trainer: The trainer that can test the module.
        steps: Optimizer steps taken.
        layers: ``Sparsifier.layer_table()`` of the weights that are tested.
        backends: Layer label to the backend that stores its weights.
        training: Operations of the whole training, and of as many dense steps; for methods of several fits, of one.
        topology: See `dst.report.summary.Topology`.
        memory: Peak of training; None if this process did not train.
        energy: Energy of training; None if a part was not measured.
        tested_step: Step of the weights that are tested.
        selected: Which weights are tested; see ``dst.lightning.best_checkpoint.SELECTIONS``.
        shortfall: The density reached, if training ended before its target density; see ``Sparsifier.shortfall``.
        seconds_before: Seconds of training by earlier processes, of a resumed run.
        trained: Whether this process trained.
    """

    trainer: lightning.Trainer
    steps: int
    layers: list[dict[str, Any]]
    backends: dict[str, str]
    training: TrainingFlops
    topology: Topology
    memory: PeakMemory | None
    energy: Energy | None
    tested_step: int
    selected: str = "last"
    shortfall: str | None = None
    seconds_before: float = 0.0
    trained: bool = True


def fit(parts: Parts, cfg: DictConfig, folder: Path, resume: Path | None, make_trainer: TrainerFactory) -> Outcome:
    """Train, or resume training, and keep checkpoints under ``checkpoints/``.

    Args:
        parts: What is trained.
        cfg: The composed configuration.
        folder: The run's folder.
        resume: The checkpoint to resume from, if any.
        make_trainer: Builds the trainer of each fit.

    Returns:
        What training leaves behind; the module holds the weights to test.

    Raises:
        ConfigurationError: The trainer stopped before its first step.
    """
    if parts.method.lottery is not None:
        return _fit_levels(parts, cfg, folder, make_trainer)
    return _fit_once(parts, cfg, folder, resume, make_trainer)


def _batch(parts: Parts, cfg: DictConfig) -> Tensor | None:
    """A batch of zeros of the size that is trained with; ``None`` without a batch size."""
    size = cfg.data.get("batch_size")
    if not isinstance(size, int):
        return None
    if isinstance(parts.example, Tensor):
        return parts.example[:1].expand(size, *parts.example.shape[1:])
    return torch.zeros(size, *parts.example)


def _fit_once(
    parts: Parts, cfg: DictConfig, folder: Path, resume: Path | None, make_trainer: TrainerFactory
) -> Outcome:
    """One ordinary fit, with a checkpoint at the end of each epoch."""
    sparse = SparseTraining(
        parts.method,
        include=cfg.include,
        exclude=cfg.exclude,
        seed=cfg.seed,
        compress_gradients=cfg.compress_gradients,
        example=_batch(parts, cfg),
    )
    # Two are kept: if the last is damaged (a full disk, a bad copy), resume=previous takes the one before it.
    saver = ModelCheckpoint(
        folder / "checkpoints",
        filename="{step}",
        monitor="step",
        mode="max",
        save_top_k=2,
        save_last="link",
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )
    recorder, spent = _recorder(parts, cfg, folder), Spent()
    best = BestCheckpoint(folder / "checkpoints" / "best", sparse) if cfg.select == "validation" else None
    # The saver comes after `best`, so that its checkpoints hold the state of `best`.
    callbacks: list[Callback] = [sparse, recorder, spent, *([best] if best is not None else []), saver]
    trainer = make_trainer(callbacks, MetricsFile(folder, resume=resume), parts.method.name)
    trainer.fit(parts.module, datamodule=parts.datamodule, ckpt_path=resume, weights_only=True)
    sparsifier = sparse.sparsifier
    if sparsifier is None:
        raise ConfigurationError(
            "the trainer stopped before its first step: nothing was trained (is trainer.max_time too short?)"
        )
    outcome = Outcome(
        trainer,
        sparsifier.step,
        sparsifier.layer_table(),
        sparsifier.backends,
        _training_flops(parts, [(sparsifier.work, sparsifier.step_counts)], sparsifier.backends, cfg.convention),
        Topology(sparsifier.updates, sparsifier.exploration_rate),
        spent.memory,
        spent.energy,
        sparsifier.step,
        shortfall=sparsifier.shortfall,
        seconds_before=spent.seconds_before,
        trained=spent.memory is not None,
    )
    return outcome if best is None else _select_best(outcome, best, parts)


def _select_best(outcome: Outcome, best: BestCheckpoint, parts: Parts) -> Outcome:
    """Put the weights of the best validation accuracy into the module, if there are any at the target density."""
    if best.load_weights(parts.module):
        return replace(outcome, layers=best.layers, tested_step=best.step, selected="validation")
    logger.warning(
        "select=validation: no validation found the network at its target density, %s; the last weights are tested",
        parts.method.density,
    )
    return outcome


def _fit_levels(parts: Parts, cfg: DictConfig, folder: Path, make_trainer: TrainerFactory) -> Outcome:
    """One fit for each level of a lottery ticket; all metrics go to one file."""
    checkpoints = folder / "checkpoints"
    spent: dict[int, Spent] = {}

    def make_level(level: int, callbacks: list[Callback], place: Path) -> lightning.Trainer:
        metrics = MetricsFile(folder, resume=place / f"{LAST}.ckpt", level=level)
        spent[level] = Spent()
        return make_trainer([*callbacks, _recorder(parts, cfg, folder, level), spent[level]], metrics, f"level {level}")

    result = run_lottery(
        parts.method,
        make_level,
        parts.module,
        parts.datamodule,
        folder=checkpoints,
        seed=cfg.seed,
        include=cfg.include,
        exclude=cfg.exclude,
    )
    levels = result.levels
    total = _training_flops(parts, [(level.work, level.step_counts) for level in levels], {}, cfg.convention)
    one = _training_flops(parts, [(levels[0].work, levels[0].step_counts)], {}, cfg.convention)
    # Each level's mask lies within the one before, so the first sparse mask holds every weight that was ever active.
    first = levels[min(1, len(levels) - 1)].layers
    explored = sum(layer["nonzero"] for layer in first) / sum(layer["weights"] for layer in first)
    steps = sum(level.steps for level in levels)
    energies = [energy for level in spent.values() if (energy := level.energy) is not None]
    return Outcome(
        result.trainer,
        steps,
        levels[-1].layers,
        {layer.label: "masked" for layer in parts.layers},
        replace(total, dense=one.dense),
        Topology(len(levels) - 1, explored),
        max((x.memory for x in spent.values() if x.memory is not None), key=lambda m: m.peak, default=None),
        # The energy of levels that an earlier process finished is unknown.
        sum_energy(energies) if len(energies) == len(levels) else None,
        steps,
        seconds_before=sum(
            spent[i].seconds_before if i in spent else level_seconds(checkpoints / f"level_{i:02d}")
            for i in range(len(levels))
        ),
        trained=any(level.memory is not None for level in spent.values()),
    )


def _training_flops(
    parts: Parts,
    fits: Sequence[tuple[Mapping[str, Mapping[str, int]], Mapping[str, int]]],
    backends: Mapping[str, str],
    convention: str,
) -> TrainingFlops:
    """Operations of fits, each given by a sparsifier's ``work`` and ``step_counts``."""
    counted = {weight.label for weight in parts.operations.weights}
    stored = [label for label, backend in backends.items() if backend == "csr" and label in counted]
    meter = FlopsMeter(parts.operations, backend="csr", stored=stored)
    for work, step_counts in fits:
        meter.add_work(work, step_counts)
    return meter.total(convention)


def _recorder(parts: Parts, cfg: DictConfig, folder: Path, level: int | None = None) -> Recorder:
    shape = getattr(parts.datamodule, "input_shape", None)
    return Recorder(folder, input_shape=shape, level=level, effective_density=cfg.effective_density)
