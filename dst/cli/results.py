"""The results of a run: what testing and measuring find, as the summary in the run's folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import DictConfig

from dst.checkpoints import json_ready
from dst.cli.build import FullSize, Parts
from dst.cli.fit import Outcome
from dst.metrics.conventions import Convention
from dst.metrics.energy import Energy
from dst.metrics.flops import flops_table
from dst.metrics.latency import time_passes
from dst.metrics.prediction import Prediction
from dst.report import REPORT_FILE, write_report
from dst.report.summary import Density, EnergyUse, Flops, Latency, MemoryUse, Quality, Summary

logger = logging.getLogger(__name__)

MIB = 2**20


@dataclass(frozen=True)
class Inference:
    """FLOPs of one sample's forward pass.

    Attributes:
        dense: Of the dense network.
        theoretical: Of the sparse network, if only active weights are computed.
        executed: Of what the backend computes.
        convention: What counts as an operation.
        warnings: Operations that no total includes, in words.
    """

    dense: float
    theoretical: float
    executed: float
    convention: Convention
    warnings: tuple[str, ...]


def summarise(
    parts: Parts,
    cfg: DictConfig,
    outcome: Outcome,
    prediction: Prediction,
    tested: Mapping[str, float],
    seconds: float,
) -> Summary:
    """Summarise a run.

    Args:
        parts: What was trained.
        cfg: The composed configuration.
        outcome: What training left behind.
        prediction: Predicts the memory of a training step.
        tested: The metrics of the test split.
        seconds: Wall time of training and test.

    Returns:
        The summary.
    """
    inference = _inference(parts, outcome, cfg.convention)
    if parts.full_size is not None:
        outcome, inference = _relative_to(parts.full_size, outcome, inference, cfg.convention)
    realised = sum(x["nonzero"] for x in outcome.layers) / sum(x["weights"] for x in outcome.layers)
    quality = Quality(
        json_ready(float(tested["test/accuracy"])),
        json_ready(float(tested["test/loss"])),
        outcome.selected,
        outcome.tested_step,
    )
    flops = Flops(
        inference_ratio=inference.theoretical / inference.dense,
        training_ratio=outcome.training.ratio,
        executed_ratio=inference.executed / inference.dense,
        training_executed_ratio=outcome.training.executed_ratio,
        dense_inference=inference.dense,
        convention=inference.convention.name,
        uncounted=list(inference.warnings),
    )
    latency, energy = _time_and_energy(parts, prediction.batch_size, outcome)
    return Summary(
        sparsity=parts.method.name,
        seed=cfg.seed,
        steps=outcome.steps,
        seconds=seconds,
        density=Density(parts.method.target_density, realised, outcome.layers, outcome.shortfall),
        test=quality,
        flops=flops,
        topology=outcome.topology,
        memory=_memory(parts, prediction, outcome),
        latency=latency,
        energy=energy,
    )


def write_results(summary: Summary, folder: Path, *, report: bool) -> None:
    """Write ``summary.json`` and, if asked for, ``report.html``. A failing report does not fail the run.

    Args:
        summary: The run's summary.
        folder: The run's folder.
        report: Whether to write the report.
    """
    summary.write(folder)
    if not report:
        return
    try:
        write_report(folder, folder / REPORT_FILE)
    except Exception as error:
        logger.warning("there is no %s: %s: %s", REPORT_FILE, type(error).__name__, error)


def _inference(parts: Parts, outcome: Outcome, convention: str) -> Inference:
    """Operations of a forward pass at the densities of the tested weights."""
    counted = {weight.label for weight in parts.operations.weights}
    found = flops_table(
        parts.operations,
        {row["name"]: row["density"] for row in outcome.layers if row["name"] in counted},
        convention=convention,
        backend="csr",
        stored=[label for label, backend in outcome.backends.items() if backend == "csr"],
    )
    return Inference(found.dense, found.theoretical, found.executed, found.convention, found.warnings)


def _relative_to(full: FullSize, outcome: Outcome, inference: Inference, convention: str) -> tuple[Outcome, Inference]:
    """Express the weights and costs of a narrow network as shares of the network of full size."""
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


def _memory(parts: Parts, prediction: Prediction, outcome: Outcome) -> MemoryUse:
    """Predicted and measured memory, in MiB."""
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


def _time_and_energy(parts: Parts, batch_size: int, outcome: Outcome) -> tuple[Latency, EnergyUse | None]:
    """Latency of the tested weights on the device they were trained on, and energy of training and inference."""
    device = outcome.trainer.strategy.root_device
    module = parts.module.to(device)
    one, batch = (time_passes(module, parts.example, size, device=device) for size in (1, batch_size))
    conditions = {"batch_size": batch_size, "device": str(device), "threads": torch.get_num_threads()}
    inference = None if batch.energy is None else batch.energy.per(batch_size)
    return (
        Latency(1e3 * one.seconds, 1e3 * batch.seconds, conditions),
        _energy_use(outcome.energy, inference, outcome.steps),
    )


def _energy_use(training: Energy | None, inference: Energy | None, steps: int) -> EnergyUse | None:
    """Energy of a training of ``steps`` steps and of one sample's inference; ``None`` if neither was measured."""
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
