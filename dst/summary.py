"""What a finished run reports: ``summary.json``, and the same as a table."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dst.errors import DataError

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Density:
    """Target and realised density over all sparse layers, and each layer's.

    Attributes:
        target: What was asked for, in (0, 1].
        realised: Active over all weights of the sparse layers.
        layers: Dicts of ``name``, ``shape``, ``weights``, ``nonzero`` and ``density``.
    """

    target: float
    realised: float
    layers: list[dict[str, Any]]


@dataclass(frozen=True)
class Quality:
    """Accuracy, in [0, 1], and mean loss of the last weights on the test split; None where not finite."""

    accuracy: float | None
    loss: float | None


@dataclass(frozen=True)
class Flops:
    """Cost relative to the dense network's.

    Attributes:
        inference_ratio: Of one forward pass.
        training_ratio: Of the whole training, over a dense training of as many steps; for methods of several fits,
            over one dense fit.
        executed_ratio: Of one forward pass as the backend carries it out, zeros multiplied or not; None in summaries of
            earlier versions. The first two are what the sparse network needs in theory.
        training_executed_ratio: The same of the whole training.
        dense_inference: FLOPs of the dense network's forward pass for one sample, a multiply-accumulate counting two.
    """

    inference_ratio: float
    training_ratio: float
    executed_ratio: float | None = None
    training_executed_ratio: float | None = None
    dense_inference: float | None = None


@dataclass(frozen=True)
class Topology:
    """Number of topology updates, and the share of sparse layers' weights that were ever active."""

    updates: int
    exploration_rate: float


@dataclass(frozen=True)
class Summary:
    """A finished run.

    Attributes:
        sparsity: The method's name.
        seed: The run's seed.
        steps: Optimizer steps taken.
        seconds: Wall time of training and test.
        density: See `Density`.
        test: See `Quality`.
        flops: See `Flops`.
        topology: See `Topology`.
    """

    sparsity: str
    seed: int
    steps: int
    seconds: float
    density: Density
    test: Quality
    flops: Flops
    topology: Topology

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``summary.json`` into ``folder``, whole or not at all."""
        path = Path(folder) / SUMMARY_FILE
        write_atomically(path, json.dumps(_finite(asdict(self)), indent=2, allow_nan=False) + "\n")
        return path

    def scalars(self) -> dict[str, float]:
        """Its finite numbers by dotted name behind ``summary/``, for loggers, without the layers' and the time taken."""
        found = {f"summary/{name}": float(getattr(self, name)) for name in ("seed", "steps")}
        for part in ("density", "test", "flops", "topology"):
            for name, value in asdict(getattr(self, part)).items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    found[f"summary/{part}.{name}"] = float(value)
        return found

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Summary:
        """Read what `write` wrote.

        Raises:
            DataError: The file is missing or is not a summary.
        """
        path = Path(folder) / SUMMARY_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            parts = {"density": Density, "test": Quality, "flops": Flops, "topology": Topology}
            return cls(**{k: parts[k](**v) if k in parts else v for k, v in values.items()})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not a run's summary: {error}") from error

    def renderable(self, folder: str | os.PathLike[str] | None = None) -> Group:
        """Return the summary as tables for ``rich``, with the run's folder below."""
        facts = Table.grid(padding=(0, 3))
        facts.add_column(style="dim")
        facts.add_column()
        weights, nonzero = (sum(layer[key] for layer in self.density.layers) for key in ("weights", "nonzero"))
        ratio = self.flops.executed_ratio
        executed = "" if ratio is None else f" in theory, {percent(ratio)} executed"
        for name, value in (
            ("test accuracy", Text(percent(self.test.accuracy), style="bold green")),
            ("test loss", number(self.test.loss)),
            (
                "density",
                f"{self.density.realised:.6g} (target {self.density.target:.6g}), {nonzero:,} of {weights:,} weights",
            ),
            ("inference FLOPs", f"{percent(self.flops.inference_ratio)} of dense{executed}"),
            ("training FLOPs", f"{percent(self.flops.training_ratio)} of dense"),
            ("topology updates", f"{self.topology.updates}"),
            ("explored", f"{percent(self.topology.exploration_rate)} of the weights"),
            ("training", f"{self.steps:,} steps in {self.seconds:.1f} s"),
        ):
            facts.add_row(name, value)
        layers = Table(box=None, header_style="dim", padding=(0, 3, 0, 0), pad_edge=False)
        layers.add_column("layer")
        for header in ("shape", "weights", "active", "density"):
            layers.add_column(header, justify="right")
        for layer in self.density.layers:
            shape = "×".join(map(str, layer["shape"]))
            counts = f"{layer['weights']:,}", f"{layer['nonzero']:,}", f"{layer['density']:.4f}"
            # Labels hold brackets, which rich would take for its own.
            layers.add_row(Text(layer["name"]), shape, *counts)
        title = Text(f"\n{self.sparsity}, seed {self.seed}\n", style="bold")
        parts: list[RenderableType] = [title, facts, Text(), layers]
        if folder is not None:
            parts.append(Text(f"\n{Path(folder)}", style="dim"))
        return Group(*parts)


def show(renderable: Any) -> None:
    """Print a ``rich`` renderable, without cutting lines where no terminal sets a width."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(renderable, highlight=False)


def percent(value: float | None) -> str:
    """Format a share, such as 0.97222, as ``97.22%``."""
    return "not finite" if value is None else f"{100 * value:.2f}%"


def number(value: float | None) -> str:
    """Format a number to four significant digits."""
    return "not finite" if value is None else f"{value:.4g}"


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``: readers see the old content or the new, never a part."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _finite(value: Any) -> Any:
    """Replace floats that JSON cannot hold (a diverged loss) by None."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
