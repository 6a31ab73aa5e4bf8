"""Lottery tickets with Lightning: each level is a new fit that starts from a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.optim import Optimizer

from dst.checkpoints import load_checkpoint, save_atomically, write_atomically
from dst.engine.lottery import level_densities, prune, rewind_rates
from dst.errors import ConfigurationError, StateError
from dst.lightning.callback import SparseTraining
from dst.method import Method
from dst.pieces import init as inits
from dst.pieces.durations import Duration, resolve_steps
from dst.topology.layers import Selector, find_layers
from dst.topology.mask_file import load_masks, save_masks

MakeTrainer = Callable[[int, list[Callback], Path], lightning.Trainer]
"""Builds the trainer of a level from the level's number, the callbacks that it must have, and the level's folder."""


@dataclass(frozen=True)
class LevelResult:
    """A finished level.

    Attributes:
        level: Its number; 0 is dense.
        density: Its target density.
        steps: Optimizer steps taken; steps before the rewind point count in level 0 only.
        step_counts: Steps by cost, as ``Sparsifier.step_counts``.
        work: As ``Sparsifier.work``.
        layers: As ``Sparsifier.layer_table()``.
        metrics: The trainer's metrics at the end of the fit.
    """

    level: int
    density: float
    steps: int
    step_counts: dict[str, int]
    work: dict[str, dict[str, int]]
    layers: list[dict[str, Any]]
    metrics: dict[str, float]


@dataclass(frozen=True)
class LotteryResult:
    """All levels, and the trainer of the last one, whose weights are in the module."""

    levels: tuple[LevelResult, ...]
    trainer: lightning.Trainer


def run_lottery(
    method: Method,
    make_trainer: MakeTrainer,
    module: lightning.LightningModule,
    datamodule: Any,
    *,
    folder: str | os.PathLike[str],
    seed: int = 0,
    include: Iterable[Selector] | None = None,
    exclude: Iterable[Selector] | None = None,
) -> LotteryResult:
    """Run all levels of magnitude pruning with rewinding, or resume where they were interrupted.

    Level 0 trains dense and saves a snapshot at the rewind point: weights, optimizers, schedulers, step and loader state.
    Each later level prunes the weights of the level before, and starts from the snapshot, or from ``start.ckpt`` in its
    folder if weights are not rewound. Finished levels are not repeated. An interrupted level resumes from its last
    checkpoint.

    Args:
        method: ``dst.methods.lottery_ticket_rewind(...)``.
        make_trainer: Builds the trainer of each level. The trainer must have the given callbacks.
        module: The module, newly initialised. It holds the weights of the last level at the end.
        datamodule: A ``datamodule`` of ``Trainer.fit``.
        folder: The folder of the levels: ``level_00``, ``level_01``, …
        seed: Seed of ties in pruning.
        include: The layers that may be sparse, by name, pattern or module type; all by default.
        exclude: Layers that stay dense.

    Returns:
        The results of all levels.

    Raises:
        ConfigurationError: A method without lottery levels, or a rewind point at or after the end of training.
    """
    if method.lottery is None:
        raise ConfigurationError(f"{method.name} has no lottery levels; use dst.methods.lottery_ticket_rewind")
    include, exclude = (None if s is None else list(s) for s in (include, exclude))
    folder = Path(folder)
    snapshot = folder / "snapshot.ckpt"
    layers, _ = find_layers(module, include, exclude)
    densities = level_densities(method.density, method.lottery.prune_fraction)
    results: list[LevelResult] = []
    trainer: lightning.Trainer | None = None
    for level, density in enumerate(densities):
        place = folder / f"level_{level:02d}"
        record, masks_file, final = place / "level.json", place / "masks.pt", place / "final.ckpt"
        if record.exists():
            results.append(LevelResult(**json.loads(record.read_text())))
            continue
        if level > 0:
            previous = folder / f"level_{level - 1:02d}"
            weights = _weights(previous / "final.ckpt", [x.parameter for x in layers])
            old = (
                load_masks(previous / "masks.pt")
                if level > 1
                else {n: torch.ones_like(w).bool() for n, w in weights.items()}
            )
            save_masks(prune(layers, weights, old, density, method.allocation, seed=seed), masks_file)
        fixed = inits.FromFile(str(masks_file)) if level > 0 else inits.Random()
        sparse = SparseTraining(
            replace(method, lottery=None, density=density, init=fixed), include=include, exclude=exclude, seed=seed
        )
        saver = ModelCheckpoint(
            dirpath=place, filename="last", save_on_train_epoch_end=True, enable_version_counter=False
        )
        metrics = _Metrics()
        fine_tuned = level > 0 and method.lottery.rewind == "none"
        rates = _Rates(_Rates.saved(folder / "level_00" / "final.ckpt") if fine_tuned else None)
        callbacks: list[Callback] = [sparse, metrics, rates, saver]
        if level == 0:
            callbacks.append(_Snapshot(snapshot, method.lottery.rewind_to))
        trainer = make_trainer(level, callbacks, place)
        last = place / "last.ckpt"
        start = last if last.exists() else None
        if start is None and level > 0:
            start = snapshot
            if method.lottery.rewind != "weights":
                start = place / "start.ckpt"
                trained = load_checkpoint(folder / f"level_{level - 1:02d}" / "final.ckpt")
                save_atomically(_start(method.lottery.rewind, trained, load_checkpoint(snapshot)), start)
        if level == 0 and start is None:
            snapshot.unlink(missing_ok=True)  # of an attempt that was interrupted before its first checkpoint
        trainer.fit(module, datamodule=datamodule, ckpt_path=start, weights_only=True)
        assert sparse.sparsifier is not None
        trainer.save_checkpoint(final)
        result = LevelResult(
            level,
            density,
            sparse.sparsifier.step,
            sparse.sparsifier.step_counts,
            sparse.sparsifier.work,
            sparse.sparsifier.layer_table(),
            metrics.saved | metrics.of(trainer),
        )
        write_atomically(record, json.dumps(asdict(result), indent=2))
        if trainer.is_global_zero:
            (place / "start.ckpt").unlink(missing_ok=True)
        results.append(result)
    if trainer is None:
        # An earlier process finished all levels: restore the weights of the last one.
        place = folder / f"level_{len(densities) - 1:02d}"
        trainer = make_trainer(len(densities) - 1, [], place)
        module.load_state_dict(load_checkpoint(place / "final.ckpt")["state_dict"])
    return LotteryResult(tuple(results), trainer)


def _start(rewind: str, trained: Mapping[str, Any], snapshot: Mapping[str, Any]) -> dict[str, Any]:
    """Return the start of a level that keeps the trained weights, with step, schedule and loader of the snapshot."""
    pairs = zip(trained["optimizer_states"], snapshot["optimizer_states"], strict=True)
    optimizers = [rewind_rates(t, s) if rewind == "learning_rate" else t for t, s in pairs]
    return {**snapshot, "state_dict": trained["state_dict"], "optimizer_states": optimizers}


class _Rates(Callback):
    """Saves the learning rates of the last step in checkpoints, and can fix the learning rates of a fit.

    Args:
        held: Fixed learning rates by optimizer and group, which override the schedule; ``None`` to follow the schedule.
    """

    KEY = "dst_rates"

    def __init__(self, held: list[list[float]] | None = None) -> None:
        self.held = held
        self._last: dict[int, list[float]] = {}

    @classmethod
    def saved(cls, checkpoint: Path) -> list[list[float]]:
        """Return the learning rates in a checkpoint.

        Raises:
            StateError: There are none.
        """
        rates = load_checkpoint(checkpoint).get(cls.KEY)
        if not rates:
            raise StateError(
                f"{checkpoint} lacks its last learning rates, which fine-tuning needs: train level 0 again"
            )
        return rates

    def on_train_batch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        for optimizer, rates in zip(trainer.optimizers, self.held or (), strict=False):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: Optimizer
    ) -> None:
        place = next(i for i, o in enumerate(trainer.optimizers) if o is optimizer)
        self._last[place] = [float(group["lr"]) for group in optimizer.param_groups]

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[self.KEY] = [self._last[i] for i in sorted(self._last)]

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._last = dict(enumerate(checkpoint.get(self.KEY, [])))


class _Metrics(Callback):
    """Saves the metrics in checkpoints, for a level that is resumed at its end and computes none."""

    def __init__(self) -> None:
        self.saved: dict[str, float] = {}

    def of(self, trainer: lightning.Trainer) -> dict[str, float]:
        return {name: float(value) for name, value in trainer.callback_metrics.items()}

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["dst_metrics"] = self.of(trainer)

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.saved = checkpoint.get("dst_metrics", {})


class _Snapshot(Callback):
    """Saves a checkpoint at one step, without the state of callbacks, which is new in each level."""

    def __init__(self, path: Path, at: Duration) -> None:
        self.path = path
        self.at = at
        self._step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        total = int(trainer.estimated_stepping_batches)
        self._step = resolve_steps(self.at, total, "rewind_to")
        if self._step >= total:
            raise ConfigurationError(f"rewind_to={self.at} leaves no steps to repeat in a training of {total} steps")
        self._save_if_due(trainer)

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        self._save_if_due(trainer)

    def _save_if_due(self, trainer: lightning.Trainer) -> None:
        if trainer.global_step != self._step or self.path.exists():
            return
        partial = self.path.with_suffix(".part")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            save_atomically({**load_checkpoint(partial), "callbacks": {}, "dst_metrics": {}}, self.path)
            partial.unlink()
        trainer.strategy.barrier("lottery snapshot")


def _weights(checkpoint: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    state = load_checkpoint(checkpoint)["state_dict"]
    return {name: state[name] for name in names}
