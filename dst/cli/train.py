"""One run: from a configuration to a trained sparse network and its summary."""

from __future__ import annotations

import csv
import inspect
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import lightning
import torch
from hydra.utils import instantiate, to_absolute_path
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from omegaconf import DictConfig, OmegaConf

from dst.checkpoints import json_ready, load_checkpoint
from dst.data.module import Task, image_task
from dst.errors import ConfigurationError, DataError, StateError
from dst.lightning.best_checkpoint import SELECTIONS, BestCheckpoint
from dst.lightning.callback import SparseTraining
from dst.lightning.lottery_levels import run_lottery
from dst.lightning.progress import Progress
from dst.lightning.recorder import Recorder
from dst.lightning.spent import Spent
from dst.method import Method, check_same
from dst.metrics.conventions import Convention, convention_of
from dst.metrics.counting import Operations, count_operations
from dst.metrics.energy import Energy, sum_energy
from dst.metrics.flops import flops_table
from dst.metrics.latency import time_passes
from dst.metrics.memory import PeakMemory
from dst.metrics.meter import FlopsMeter, TrainingFlops
from dst.metrics.prediction import Prediction
from dst.models.classifier import Classifier
from dst.models.narrowing import build_on_meta, check_takes_width_factor, narrow
from dst.planning.first_mask import layer_counts
from dst.report import REPORT_FILE, write_report
from dst.report.summary import Density, EnergyUse, Flops, Latency, MemoryUse, Quality, Summary, Topology
from dst.topology.layers import SparseLayer, find_layers

logger = logging.getLogger(__name__)

MIB = 2**20

LAST, PREVIOUS = "last", "previous"

TrainerFactory: TypeAlias = "Callable[[list[Callback], MetricsFile, str], lightning.Trainer]"
"""Builds the trainer of one fit from callbacks, its metrics file and the title of its progress bar."""


@dataclass(frozen=True)
class FullSize:
    """The dense network of full size that a narrower one is compared with: its layers and operations."""

    layers: Sequence[SparseLayer]
    operations: Operations


@dataclass(frozen=True)
class Parts:
    """What a configuration describes, built and checked; nothing is written yet.

    ``full_size`` is that of a module which was made narrower, and ``None`` for others.
    """

    method: Method
    datamodule: Any
    module: Classifier
    layers: Sequence[SparseLayer]
    operations: Operations
    example: Sequence[int] | torch.Tensor
    full_size: FullSize | None = None


@dataclass(frozen=True)
class Inference:
    """FLOPs of one sample's forward pass.

    Attributes:
        dense: Of the dense network.
        theoretical: What the sparse one needs.
        executed: What the backend carries out.
        convention: What counts as an operation.
        warnings: What is in no total, in words.
    """

    dense: float
    theoretical: float
    executed: float
    convention: Convention
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What training leaves behind.

    Attributes:
        trainer: The trainer that can test the module.
        steps: Optimizer steps taken.
        layers: ``Sparsifier.layer_table()`` of the weights that are tested.
        backends: Layer label to where its weights live.
        training: Operations of the whole training, and of as many dense steps; for methods of several fits, of one.
        topology: See `dst.report.summary.Topology`.
        memory: Measured in training; None where it ran elsewhere.
        energy: Of training; None if a part was not measured.
        tested_step: Step of the weights that are tested.
        selected: Which weights these are; see ``dst.lightning.best_checkpoint.SELECTIONS``.
        shortfall: Where training ended before its density was reached, what it did reach; see ``Sparsifier.shortfall``.
        seconds_before: Seconds of training before this process, of a run that was resumed.
        trained: Whether this process has trained at all.
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


def run(cfg: DictConfig, folder: str | os.PathLike[str], *, sweep: bool = False) -> Summary:
    """Train and test what a configuration describes.

    Everything is built and checked before anything is written. The folder then gets ``checkpoints/``, ``metrics.csv`` and,
    at the end, ``summary.json``.

    Args:
        cfg: The composed ``conf/train.yaml``.
        folder: The run's folder.
        sweep: Whether the run is one of several in one command.

    Returns:
        What was written as ``summary.json``.

    Raises:
        ConfigurationError: A setting, or a combination of settings, that cannot be trained; data that is missing.
        StateError: A checkpoint to resume from that belongs to another run.
    """
    folder = Path(folder)
    _quieten()
    parts = build(cfg)
    _set_threads(cfg.threads, sum(parts.operations.macs.values()) * cfg.data.get("batch_size", 1))
    resume = _resume_point(cfg.resume, folder, parts.method)
    launcher = _trainer(cfg, folder, [], [], "").strategy.launcher  # also shows what is wrong with the settings
    if sweep and isinstance(launcher, _SubprocessScriptLauncher):
        raise ConfigurationError(
            "this strategy starts the command once more for every device, which in a sweep would repeat the "
            "sweep: use trainer.strategy=ddp_fork or ddp_spawn, trainer.devices=1, or separate commands"
        )
    batch_size = int(cfg.data.get("batch_size", 1))
    with _blaming("model"):
        prediction = Prediction(parts.module, parts.example, batch_size, parts.layers)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    fit = _fit if parts.method.lottery is None else _fit_lottery
    with _chosen_logger(cfg, folder) as chosen:

        def make_trainer(callbacks: list[Callback], metrics: MetricsFile, title: str) -> lightning.Trainer:
            return _trainer(cfg, folder, callbacks, [metrics, *chosen], title)

        outcome = fit(parts, cfg, folder, resume, make_trainer)
        if not outcome.trained and (found := _finished(folder, outcome.steps)) is not None:
            return found
        inference = _inference(parts, outcome.layers, outcome.backends, cfg.convention)
        if parts.full_size is not None:
            outcome, inference = _relative_to(parts.full_size, outcome, inference, cfg.convention)
        (tested,) = outcome.trainer.test(parts.module, datamodule=parts.datamodule, verbose=False)
        seconds = time.perf_counter() - began + outcome.seconds_before
        summary = Summary(
            sparsity=parts.method.name,
            seed=cfg.seed,
            steps=outcome.steps,
            seconds=seconds,
            density=Density(parts.method.target_density, _realised(outcome.layers), outcome.layers, outcome.shortfall),
            test=Quality(
                json_ready(float(tested["test/accuracy"])),
                json_ready(float(tested["test/loss"])),
                outcome.selected,
                outcome.tested_step,
            ),
            flops=Flops(
                inference_ratio=inference.theoretical / inference.dense,
                training_ratio=outcome.training.ratio,
                executed_ratio=inference.executed / inference.dense,
                training_executed_ratio=outcome.training.executed_ratio,
                dense_inference=inference.dense,
                convention=inference.convention.name,
                uncounted=list(inference.warnings),
            ),
            topology=outcome.topology,
            memory=_memory(parts, prediction, outcome),
            **_timed(parts, batch_size, outcome),
        )
        for target in outcome.trainer.loggers:
            target.log_metrics(summary.scalars(), step=outcome.trainer.global_step)
    if outcome.trainer.is_global_zero:
        summary.write(folder)
        if cfg.report:
            _report(folder)
    return summary


def _memory(parts: Parts, prediction: Prediction, outcome: Outcome) -> MemoryUse:
    """Predicted beside measured, in MiB."""
    nonzero = {layer["name"]: layer["nonzero"] for layer in outcome.layers}
    dynamic = parts.method.is_dynamic and parts.method.lottery is None
    needed = prediction.memory(nonzero, outcome.backends, parts.module.optimizer, dynamic=dynamic)
    measured = outcome.memory
    return MemoryUse(
        predicted_mib=needed.total / MIB,
        peak_mib=None if measured is None else measured.peak / MIB,
        source="nothing was trained in this process" if measured is None else measured.source,
        parts={name: value / MIB for name, value in vars(needed).items()},
        conditions={
            "batch_size": prediction.batch_size,
            "before_mib": None if measured is None else measured.before / MIB,
        },
    )


def _timed(parts: Parts, batch_size: int, outcome: Outcome) -> dict[str, Any]:
    """Latency and energy of the weights that were tested, where they were trained."""
    device = outcome.trainer.strategy.root_device
    module = parts.module.to(device)
    one, batch = (time_passes(module, parts.example, size, device=device) for size in (1, batch_size))
    conditions = {"batch_size": batch_size, "device": str(device), "threads": torch.get_num_threads()}
    return {
        "latency": Latency(1e3 * one.seconds, 1e3 * batch.seconds, conditions),
        "energy": _energy_use(
            outcome.energy, None if batch.energy is None else batch.energy.per(batch_size), outcome.steps
        ),
    }


def _energy_use(training: Energy | None, inference: Energy | None, steps: int) -> EnergyUse | None:
    """Energy of a training of ``steps`` steps and of one sample's inference; None if neither was measured."""
    sources = dict.fromkeys(
        source for energy in (training, inference) if energy is not None for source in energy.sources
    )
    if not sources:
        return None
    return EnergyUse(
        training_joules=None if training is None else training.joules,
        step_joules=None if training is None or not steps else training.joules / steps,
        inference_joules=None if inference is None else inference.joules,
        source="; ".join(sources),
    )


def _realised(layers: Sequence[Mapping[str, Any]]) -> float:
    return sum(x["nonzero"] for x in layers) / sum(x["weights"] for x in layers)


def _report(folder: Path) -> None:
    """Write the report; a training that has ended well does not fail for it."""
    try:
        write_report(folder, folder / REPORT_FILE)
    except Exception as error:
        logger.warning("there is no %s: %s: %s", REPORT_FILE, type(error).__name__, error)


def build(cfg: DictConfig) -> Parts:
    """Build and check everything but the trainer; nothing is written but a download that the data asked for.

    Args:
        cfg: The composed configuration.

    Raises:
        ConfigurationError: As `run`.
    """
    if not 0 < cfg.density <= 1:
        raise ConfigurationError(f"density={cfg.density} must lie in (0, 1]: the share of weights that are kept")
    if not 0 <= cfg.seed < 2**32:
        raise ConfigurationError(f"seed={cfg.seed} must lie in [0, 2**32)")
    _check_trains(cfg)
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    method = _make(cfg.sparsity)
    if cfg.backend not in ("masked", "auto") and "backend" not in cfg.sparsity:
        raise ConfigurationError(
            f"{method.name} keeps {method.backend} weights, and backend={cfg.backend} has none: leave it out"
        )
    places = {key: to_absolute_path(cfg.data[key]) for key in ("root", "path") if cfg.data.get(key) is not None}
    datamodule = _make(cfg.data, **places)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the other processes of a machine find what this one fetched
        datamodule.prepare_data()
        datamodule.setup("fit")
    convention_of(cfg.convention)
    _check_selection(cfg, method, datamodule)
    task = _task(datamodule)
    optimizer, scheduler = _make(cfg.optimizer), _make(cfg.scheduler)
    _check_match(cfg, task)

    def make(**settings: Any) -> Classifier:
        return task.module(_make(cfg.model, **task.arguments, **settings), optimizer, scheduler)

    full_size = None
    if method.narrow is None:
        module = make()
    else:
        method, module, full_size = _narrow(cfg, method, make, task)
    with _blaming("optimizer, scheduler"):
        trial = optimizer(module.parameters())
        if scheduler is not None:
            scheduler(trial, 100)
    layers, _ = find_layers(module, cfg.include, cfg.exclude)
    _check_budget(method, layers)
    with _blaming("model"):
        operations = count_operations(module, task.example)
    return Parts(method, datamodule, module, layers, operations, task.example, full_size)


def _check_trains(cfg: DictConfig) -> None:
    """Refuse settings that train nothing, or nothing but NaN."""
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if (value := cfg.trainer.get(name)) is not None and value == 0:
            raise ConfigurationError(f"trainer.{name}={value}: nothing would be trained; leave it out, or raise it")
    for setting, number in cfg.optimizer.items():
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigurationError(
                f"optimizer.{setting}={number} is not finite: no weight would be after the first step"
            )


def _narrow(
    cfg: DictConfig, method: Method, make: Callable[..., Classifier], task: Task
) -> tuple[Method, Classifier, FullSize]:
    """Build the module as narrow as the method wants it; the method then says how narrow that is."""
    assert method.narrow is not None
    model = instantiate(cfg.model, _partial_=True, _convert_="all")
    check_takes_width_factor(model.func)
    width = cfg.model.get("width_factor", 1.0)  # of full size

    def of_width(width_factor: float) -> Classifier:
        return make(width_factor=width * width_factor)

    of_width.__name__ = model.func.__name__  # the one that messages name
    found = narrow(
        of_width,
        method.narrow.density,
        method.narrow.match,
        example=task.example,
        include=cfg.include,
        exclude=cfg.exclude,
    )
    whole = build_on_meta(of_width, 1.0)
    layers, _ = find_layers(whole, cfg.include, cfg.exclude)
    method = replace(method, narrow=replace(method.narrow, width_factor=found.width_factor))
    return method, of_width(found.width_factor), FullSize(layers, count_operations(whole, task.example))


def _relative_to(full: FullSize, outcome: Outcome, inference: Inference, convention: str) -> tuple[Outcome, Inference]:
    """What a narrow network has and costs, in the place of shares of itself as shares of the one of full size.

    Args:
        full: The network of full size.
        outcome: The narrow network's own.
        inference: Likewise.
        convention: What counts as an operation.
    """
    nonzero = {row["name"]: row["nonzero"] for row in outcome.layers}
    layers = [
        {
            "name": layer.label,
            "shape": list(layer.shape),
            "weights": layer.weights,
            "nonzero": nonzero.get(layer.label, 0),
            "density": nonzero.get(layer.label, 0) / layer.weights,
        }
        for layer in full.layers
    ]
    dense = flops_table(full.operations, {}, convention=convention).dense
    share = inference.dense / dense
    explored = sum(nonzero.values()) / sum(layer.weights for layer in full.layers)
    outcome = replace(
        outcome,
        layers=layers,
        training=replace(outcome.training, dense=outcome.training.dense / share),
        topology=replace(outcome.topology, exploration_rate=explored),
    )
    return outcome, replace(inference, dense=dense)


def _task(datamodule: Any) -> Task:
    """What the data ask of the model; data modules that only know images' shape and classes are of that task."""
    task = getattr(datamodule, "task", None)
    return task if isinstance(task, Task) else image_task(datamodule.input_shape, datamodule.num_classes)


def _check_selection(cfg: DictConfig, method: Method, datamodule: Any) -> None:
    if cfg.select not in SELECTIONS:
        raise ConfigurationError(f"select={cfg.select} is unknown; choose from {', '.join(SELECTIONS)}")
    if cfg.select == "last":
        return
    if method.lottery is not None:
        raise ConfigurationError(f"{method.name} rewinds and trains to the end, level by level: use select=last")
    if not getattr(datamodule, "validation", 1) or not cfg.trainer.limit_val_batches:
        raise ConfigurationError(
            f"select={cfg.select} needs samples that are held out of training: set data.validation above 0, such as "
            "data.validation=0.1, and leave trainer.limit_val_batches at 1.0"
        )


def _check_match(cfg: DictConfig, task: Task) -> None:
    """Refuse a model that is not made for such data, such as a model of text for images."""
    parameters = inspect.signature(instantiate(cfg.model, _partial_=True, _convert_="all").func).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    if missing := [name for name in task.arguments if name not in parameters]:
        raise ConfigurationError(
            f"the model {cfg.model._target_} is not made for {cfg.data._target_}, which describes its task by "
            f"{' and '.join(task.arguments)}: it takes no {' and no '.join(missing)}; choose another model= or data="
        )


def _check_budget(method: Method, layers: Sequence[SparseLayer]) -> None:
    """Raise now what an allocation would raise when the mask is made, which may be late in training."""
    layer_counts(method, layers, method.density)


def _trainer(
    cfg: DictConfig, folder: Path, callbacks: list[Callback], loggers: list[Logger], title: str
) -> lightning.Trainer:
    if cfg.trainer.enable_progress_bar:
        callbacks = [*callbacks, Progress(title)]
    return _make(cfg.trainer, callbacks=callbacks, logger=loggers, default_root_dir=folder)


def _fit(parts: Parts, cfg: DictConfig, folder: Path, resume: Path | None, make_trainer: TrainerFactory) -> Outcome:
    """One ordinary fit, with the checkpoint of the last epoch."""
    sparse = SparseTraining(
        parts.method,
        include=cfg.include,
        exclude=cfg.exclude,
        seed=cfg.seed,
        compress_gradients=cfg.compress_gradients,
    )
    # Two are kept: where the last is damaged (a full disk, a bad copy), the one before it is not.
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
    # The last checkpoint is saved after the best, and knows of it.
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
        _training(parts, [(sparsifier.work, sparsifier.step_counts)], sparsifier.backends, cfg.convention),
        Topology(sparsifier.updates, sparsifier.exploration_rate),
        spent.memory,
        spent.energy,
        sparsifier.step,
        shortfall=sparsifier.shortfall,
        seconds_before=spent.seconds_before,
        trained=spent.memory is not None,
    )
    if best is None:
        return outcome
    if not best.load_weights(parts.module):
        logger.warning(
            "select=validation: no validation found the network at its target density, %s; the last weights are tested",
            parts.method.density,
        )
        return outcome
    return replace(outcome, layers=best.layers, tested_step=best.step, selected=cfg.select)


def _fit_lottery(
    parts: Parts, cfg: DictConfig, folder: Path, resume: Path | None, make_trainer: TrainerFactory
) -> Outcome:
    """One fit a level, all levels' metrics in one file."""
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
        folder=folder / "checkpoints",
        seed=cfg.seed,
        include=cfg.include,
        exclude=cfg.exclude,
    )
    total = _training(parts, [(level.work, level.step_counts) for level in result.levels], {}, cfg.convention)
    one = _training(parts, [(result.levels[0].work, result.levels[0].step_counts)], {}, cfg.convention)
    masked = {layer.label: "masked" for layer in parts.layers}
    # Levels' masks lie within each other, so the first that is sparse holds all that were ever active.
    first = result.levels[min(1, len(result.levels) - 1)].layers
    explored = sum(layer["nonzero"] for layer in first) / sum(layer["weights"] for layer in first)
    steps = sum(level.steps for level in result.levels)
    energies = [energy for level in spent.values() if (energy := level.energy) is not None]
    return Outcome(
        result.trainer,
        steps,
        result.levels[-1].layers,
        masked,
        replace(total, dense=one.dense),
        Topology(len(result.levels) - 1, explored),
        max((x.memory for x in spent.values() if x.memory is not None), key=lambda m: m.peak, default=None),
        # What levels took that were finished before a resume is not known.
        sum_energy(energies) if len(energies) == len(result.levels) else None,
        steps,
        seconds_before=sum(
            spent[i].seconds_before if i in spent else _seconds_of(folder / "checkpoints" / f"level_{i:02d}")
            for i in range(len(result.levels))
        ),
        trained=any(level.memory is not None for level in spent.values()),
    )


def _seconds_of(level: Path) -> float:
    """Seconds of training of a level that an earlier process has finished, as its checkpoint tells."""
    path = level / f"{LAST}.ckpt"
    state = _load(path).get("callbacks", {}).get(Spent.__qualname__, {}) if path.is_file() else {}
    return float(state.get("seconds", 0.0))


def _finished(folder: Path, steps: int) -> Summary | None:
    """The summary of a run that was finished before, or ``None``."""
    try:
        summary = Summary.read(folder)
    except DataError:
        return None
    return summary if summary.steps == steps else None


def _inference(
    parts: Parts, table: Sequence[Mapping[str, Any]], backends: Mapping[str, str], convention: str
) -> Inference:
    """Operations of a forward pass with the densities of a ``layer_table``."""
    found = flops_table(
        parts.operations,
        {row["name"]: row["density"] for row in table if row["name"] in _counted(parts)},
        convention=convention,
        backend="csr",
        stored=[label for label, backend in backends.items() if backend == "csr"],
    )
    return Inference(found.dense, found.theoretical, found.executed, found.convention, found.warnings)


def _counted(parts: Parts) -> set[str]:
    return {weight.label for weight in parts.operations.weights}


def _training(
    parts: Parts,
    fits: Sequence[tuple[Mapping[str, Mapping[str, int]], Mapping[str, int]]],
    backends: Mapping[str, str],
    convention: str,
) -> TrainingFlops:
    """Operations of fits, each given by a sparsifier's ``work`` and ``step_counts``."""
    stored = [label for label, backend in backends.items() if backend == "csr" and label in _counted(parts)]
    meter = FlopsMeter(parts.operations, backend="csr", stored=stored)
    for work, step_counts in fits:
        meter.add_work(work, step_counts)
    return meter.total(convention)


def _recorder(parts: Parts, cfg: DictConfig, folder: Path, level: int | None = None) -> Recorder:
    shape = getattr(parts.datamodule, "input_shape", None)
    return Recorder(folder, input_shape=shape, level=level, effective_density=cfg.effective_density)


class MetricsFile(CSVLogger):
    """``metrics.csv`` in the run's folder; rows from before a resume stay.

    Args:
        folder: The run's folder.
        resume: Checkpoint that training goes on from, if it exists: rows after its step are dropped.
        level: Number of the fit where a run has several; a column then, and other fits' rows stay.
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
    step = _load(resume)["global_step"] if resume is not None and resume.exists() else -1
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if (level is not None and int(row["level"]) != level) or int(row["step"]) <= step]


@contextmanager
def _chosen_logger(cfg: DictConfig, folder: Path) -> Iterator[list[Logger]]:
    """The logger beside ``metrics.csv``, if one is chosen, with the settings of the run; closed afterwards."""
    logger = _make(cfg.logger, save_dir=folder)
    if logger is None:
        yield []
        return
    try:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
        yield [logger]
    finally:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()  # or the next run of a sweep would go on in this one


def _resume_point(resume: str | None, folder: Path, method: Method) -> Path | None:
    """Return the checkpoint to go on from, checked to be one."""
    checkpoints = folder / "checkpoints"
    if resume is None:
        if checkpoints.exists() and any(checkpoints.iterdir()):
            raise ConfigurationError(
                f"{folder} holds an earlier run: go on with it by resume={LAST}, or choose another hydra.run.dir"
            )
        return None
    if method.lottery is not None:
        if resume != LAST or not checkpoints.is_dir():
            raise ConfigurationError(
                f"{method.name} goes on level by level: use resume={LAST} with hydra.run.dir=<the run's folder>"
            )
        return None
    if resume == PREVIOUS:
        path = _previous(checkpoints)
        _check_same(path, method)
        return path
    path = checkpoints / f"{LAST}.ckpt" if resume == LAST else Path(to_absolute_path(resume))
    if not path.is_file():
        advice = "name the run's folder by hydra.run.dir=FOLDER" if resume == LAST else "check the path"
        raise ConfigurationError(f"resume={resume}: there is no checkpoint {path}; {advice}")
    _check_same(path, method)
    return path


def _check_same(path: Path, method: Method) -> None:
    """Refuse the checkpoint of another method: of another width, its weights would not even fit."""
    state = _load(path).get("callbacks", {}).get(SparseTraining.__qualname__)
    if isinstance(state, Mapping) and isinstance(state.get("method"), Mapping):
        check_same(state["method"], method)


def _previous(checkpoints: Path) -> Path:
    """Return the newest readable checkpoint before the last."""
    last = (checkpoints / f"{LAST}.ckpt").resolve()
    older = [p for p in checkpoints.glob("*.ckpt") if not p.is_symlink() and p != last]
    for path in sorted(older, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        try:
            _load(path)
        except ConfigurationError:
            continue
        return path
    raise ConfigurationError(f"resume={PREVIOUS}: no readable checkpoint before the last one in {checkpoints}")


def _load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of Lightning's, or say what to do instead."""
    try:
        checkpoint = load_checkpoint(path)
        if "global_step" not in checkpoint:
            raise StateError(f"{path} is not a checkpoint of a training run")
    except StateError as error:
        remedy = f"; resume={PREVIOUS} takes the one before it" if path.stem == LAST else ""
        raise ConfigurationError(f"{error}{remedy}") from error
    return checkpoint


def _make(node: DictConfig, **arguments: Any) -> Any:
    """Instantiate a configuration with arguments that are objects, which Hydra itself would copy."""
    if node.get("_target_") is None:
        return None
    factory = instantiate(node, _partial_=True, _convert_="all")
    with _blaming(str(node._get_full_key(None))):
        return factory if node.get("_partial_") else factory(**arguments)


@contextmanager
def _blaming(key: str) -> Iterator[None]:
    """Turn what a class raises for bad arguments into a ``ConfigurationError`` that names the setting."""
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(f"{key}: {error}") from error


def _set_threads(threads: int | None, macs: int) -> None:
    """Set PyTorch's CPU threads; small batches of small networks take one, since more only wait for each other."""
    if threads is not None and threads < 1:
        raise ConfigurationError(f"threads={threads} must be at least 1, or null")
    if threads is not None or macs < 2**26:
        torch.set_num_threads(threads or 1)


def _quieten() -> None:
    """Silence what Lightning says about itself; warnings about training stay."""
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
