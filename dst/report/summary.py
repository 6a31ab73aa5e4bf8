"""The summary of a finished run: ``summary.json``, and the same as a table."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from dst.checkpoints import json_ready, write_atomically
from dst.errors import DataError
from dst.metrics.conventions import convention_of
from dst.report.terminal import terminal_facts, terminal_table

SUMMARY_FILE = "summary.json"

CONVENTION, NOT_COUNTED = "convention", "not counted"
"""Names of two of the entries of `Summary.costs`."""


@dataclass(frozen=True)
class Density:
    """Target and realised density of all sparse layers and of each.

    Attributes:
        target: The density that was set, in (0, 1].
        realised: Active weights / weights of the sparse layers, in [0, 1].
        layers: Dicts of ``name``, ``shape``, ``weights``, ``nonzero`` and ``density``.
        shortfall: Why training ended before it reached the target. None if it did reach it.
    """

    target: float
    realised: float
    layers: list[dict[str, Any]]
    shortfall: str | None = None


@dataclass(frozen=True)
class Quality:
    """Results of the selected weights on the test split, which no selection uses.

    Attributes:
        accuracy: Accuracy in [0, 1]; None if not finite.
        loss: Mean loss; None if not finite.
        weights: Which weights were tested: "last", or "validation" for those of the best validation accuracy.
        step: Number of optimizer steps that trained them; None in summaries of earlier versions.
    """

    accuracy: float | None
    loss: float | None
    weights: str = "last"
    step: int | None = None


@dataclass(frozen=True)
class Flops:
    """FLOPs relative to the dense network.

    The first two ratios are theoretical: what the sparse network needs. The executed ones are what the backend computes,
    which may include multiplications by zero.

    Attributes:
        inference_ratio: FLOPs of one forward pass.
        training_ratio: FLOPs of the whole training, relative to a dense training of as many steps. For methods of several
            fits, relative to one dense fit.
        executed_ratio: Executed FLOPs of one forward pass; None in summaries of earlier versions.
        training_executed_ratio: Executed FLOPs of the whole training; None in summaries of earlier versions.
        dense_inference: Operations of the dense network's forward pass for one sample, counted by ``convention``.
        convention: What counts as an operation; see ``dst.metrics.CONVENTIONS``.
        uncounted: Operators and parameters that no total includes, in words.
    """

    inference_ratio: float
    training_ratio: float
    executed_ratio: float | None = None
    training_executed_ratio: float | None = None
    dense_inference: float | None = None
    convention: str = "flops"
    uncounted: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MemoryUse:
    """Memory of training, in MiB.

    Attributes:
        predicted_mib: Predicted memory of weights, topology, gradients, optimizer state and the activations of a batch, at
            the density of the weights that are tested; see ``dst.metrics.predict_memory``.
        peak_mib: Measured peak in training; on a CPU, of the whole process. None if training ran in another process, before
            a resume.
        source: What was measured, in words.
        parts: Parts of the prediction in MiB: weights, topology, gradients, optimizer_state, activations.
        conditions: ``batch_size``, and ``before_mib``, the memory in use before training. Where runs share a process, the
            difference to the peak tells little, because a process reuses freed memory.
    """

    predicted_mib: float
    peak_mib: float | None
    source: str
    parts: dict[str, float]
    conditions: dict[str, Any]


@dataclass(frozen=True)
class Latency:
    """Median time of a forward pass in evaluation mode, on the machine that trained.

    Attributes:
        one_ms: Milliseconds for a single sample.
        batch_ms: Milliseconds for a batch.
        conditions: ``batch_size``, ``device`` and ``threads``.
    """

    one_ms: float
    batch_ms: float
    conditions: dict[str, Any]


@dataclass(frozen=True)
class EnergyUse:
    """Measured energy, in joules.

    Attributes:
        training_joules: Energy of all fits; None if a part was not measured.
        step_joules: Energy of training per optimizer step; None as above.
        inference_joules: Energy per sample, in a batch as in `Latency`; None if it was not measured.
        source: What was read, in words.
    """

    training_joules: float | None
    step_joules: float | None
    inference_joules: float | None
    source: str


@dataclass(frozen=True)
class Topology:
    """Number of topology updates, and the share of the sparse layers' weights that were ever active."""

    updates: int
    exploration_rate: float


@dataclass(frozen=True)
class Summary:
    """A finished run.

    Attributes:
        sparsity: Name of the method.
        seed: The run's seed.
        steps: Number of optimizer steps.
        seconds: Wall time of training and test. For a resumed run, the sum over its processes.
        density: See `Density`.
        test: See `Quality`.
        flops: See `Flops`.
        topology: See `Topology`.
        memory: See `MemoryUse`; None in summaries of earlier versions, as are the next two.
        latency: See `Latency`.
        energy: See `EnergyUse`; None on machines without an energy counter.
    """

    sparsity: str
    seed: int
    steps: int
    seconds: float
    density: Density
    test: Quality
    flops: Flops
    topology: Topology
    memory: MemoryUse | None = None
    latency: Latency | None = None
    energy: EnergyUse | None = None

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``summary.json`` into ``folder`` atomically."""
        path = Path(folder) / SUMMARY_FILE
        write_atomically(path, json.dumps(json_ready(asdict(self)), indent=2, allow_nan=False) + "\n")
        return path

    def scalars(self) -> dict[str, float]:
        """The finite numbers as ``summary/`` and their dotted names, for loggers. Layers and wall time are left out."""
        found = {f"summary/{name}": float(getattr(self, name)) for name in ("seed", "steps")}
        for part in _PARTS:
            for name, value in leaves(asdict(getattr(self, part)) if getattr(self, part) is not None else {}):
                if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                    found[f"summary/{part}.{name}"] = float(value)
        return found

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Summary:
        """Read what `write` wrote, in this version or an earlier one.

        Energy that an earlier version estimated is left out.

        Raises:
            DataError: The file is missing or is not a summary.
        """
        path = Path(folder) / SUMMARY_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values["energy"] = _measured(values.get("energy"))
            return cls(**{k: _PARTS[k](**v) if k in _PARTS and v is not None else v for k, v in values.items()})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not a run's summary: {error}") from error

    @property
    def selection(self) -> str:
        """Which weights were tested, in words."""
        if self.test.weights == "last":
            return "last weights"
        return f"best validation accuracy, at step {self.test.step:,}"

    def costs(self) -> list[tuple[str, str]]:
        """Names and texts of how operations were counted and of what was measured on the machine."""
        found = []
        if self.flops.dense_inference is not None:
            rule = convention_of(self.flops.convention)
            found.append(("dense inference", f"{self.flops.dense_inference:,.0f} {rule.unit} a sample"))
            found.append((CONVENTION, f"{rule.name}: {rule.description}"))
        found += [(NOT_COUNTED, line) for line in self.flops.uncounted]
        if self.memory is not None:
            m = self.memory
            found.append(("memory, predicted", f"{m.predicted_mib:.3g} MiB at batch size {m.conditions['batch_size']}"))
            if m.peak_mib is not None:
                text = f"{m.peak_mib:.4g} MiB, {m.conditions['before_mib']:.4g} MiB before training ({m.source})"
                found.append(("memory, measured peak", text))
        if self.latency is not None:
            on, size = self.latency.conditions, self.latency.conditions["batch_size"]
            where = f"{on['device']}, {on['threads']} thread{'s' * (on['threads'] != 1)}"
            found.append(
                ("latency", f"{self.latency.one_ms:.3g} ms, {self.latency.batch_ms:.3g} ms a batch of {size} ({where})")
            )
        if self.energy is not None:
            e = self.energy
            if e.training_joules is not None:
                step = "" if e.step_joules is None else f", {e.step_joules:.3g} J a step"
                found.append(("training energy", f"{e.training_joules:.3g} J{step} ({e.source})"))
            if e.inference_joules is not None:
                found.append(("inference energy", f"{e.inference_joules:.3g} J a sample ({e.source})"))
        return found

    def renderable(self, folder: str | os.PathLike[str] | None = None) -> Group:
        """Return the summary as tables for ``rich``, with the run's folder below."""
        weights, nonzero = (sum(layer[key] for layer in self.density.layers) for key in ("weights", "nonzero"))
        density = f"{self.density.realised:.6g} (target {self.density.target:.6g}), {nonzero:,} of {weights:,} weights"
        facts: list[tuple[str, str | Text]] = [
            ("test accuracy", Text.assemble((percent(self.test.accuracy), "bold green"), f"  ({self.selection})")),
            ("test loss", number(self.test.loss)),
            ("density", density),
            *([("not reached", Text(self.density.shortfall, style="yellow"))] if self.density.shortfall else []),
            ("inference FLOPs", _of_dense(self.flops.inference_ratio, self.flops.executed_ratio)),
            ("training FLOPs", _of_dense(self.flops.training_ratio, self.flops.training_executed_ratio)),
            ("topology updates", f"{self.topology.updates}"),
            ("explored", f"{percent(self.topology.exploration_rate)} of the weights"),
            ("training", f"{self.steps:,} steps in {self.seconds:.1f} s"),
            *((name, Text(line, style="yellow" if name == NOT_COUNTED else "")) for name, line in self.costs()),
        ]
        layers = [("layer", "shape", "weights", "active", "density")]
        for layer in self.density.layers:
            counts = f"{layer['weights']:,}", f"{layer['nonzero']:,}", f"{layer['density']:.4f}"
            layers.append((layer["name"], shape_text(layer["shape"]), *counts))
        title = Text(f"\n{self.sparsity}, seed {self.seed}\n", style="bold")
        parts: list[RenderableType] = [title, terminal_facts(facts), Text(), terminal_table(layers)]
        if folder is not None:
            parts.append(Text(f"\n{Path(folder)}", style="dim"))
        return Group(*parts)


def _measured(energy: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Energy as read from a file, without the flag of earlier versions; None if they estimated it."""
    if energy is None or energy.get("estimated", False):
        return None
    return {name: value for name, value in energy.items() if name != "estimated"}


_PARTS: dict[str, Any] = {
    "density": Density,
    "test": Quality,
    "flops": Flops,
    "topology": Topology,
    "memory": MemoryUse,
    "latency": Latency,
    "energy": EnergyUse,
}


def leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested mappings.

    Args:
        value: A mapping; values that are mappings are entered.
        prefix: Put before every name.
    """
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _of_dense(theoretical: float, executed: float | None) -> str:
    done = "" if executed is None else f" in theory, {percent(executed)} executed"
    return f"{percent(theoretical)} of dense{done}"


def percent(value: float | None) -> str:
    """Format a share, such as 0.97222, as ``97.22%``."""
    return "not finite" if value is None else f"{100 * value:.2f}%"


def shape_text(shape: Sequence[int]) -> str:
    """Format a shape as ``8×16``."""
    return "×".join(map(str, shape))


def number(value: float | None) -> str:
    """Format a number to four significant digits."""
    return "not finite" if value is None else f"{value:.4g}"
