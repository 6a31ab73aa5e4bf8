"""What a checkpoint holds: its layers, their densities and their health. Nothing in the file is executed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.text import Text
from torch import Tensor

from dst.backends.saved import as_mask, is_mask, is_union, union_as_mask
from dst.checkpoints import load_checkpoint
from dst.errors import StateError
from dst.metrics.health import dead_inputs, dead_outputs
from dst.report.summary import shape_text
from dst.report.terminal import terminal_facts, terminal_table

_STATE_KEYS = {"format", "method", "masks", "layers", "steps"}
_DEPTH = 4
"""How deep a sparsifier's state may lie within a checkpoint: Lightning has it at ``callbacks.SparseTraining``."""


@dataclass(frozen=True)
class InspectedLayer:
    """One layer's connections.

    Attributes:
        name: Its label.
        shape: Shape (out, in, ...); of transposed convolutions (in, out, ...).
        weights: Number of weights.
        active: Active ones.
        dead_outputs: Units of the first dimension without any connection.
        dead_inputs: Units of the second dimension (of grouped convolutions, those within a group) without any connection.
        zeros: Active weights that are exactly zero, as grown ones are at first; None where the file has no weights.
        leaks: Inactive weights that are not zero, which never should be; None where the file has no weights.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    active: int
    dead_outputs: int
    dead_inputs: int
    zeros: int | None
    leaks: int | None

    @property
    def density(self) -> float:
        """Active over all weights."""
        return self.active / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's topology.

    Attributes:
        path: The file.
        kind: What it is, in words.
        facts: Name to value of what the file says about the run; may be empty.
        target: Density that the method was asked for, or None where the file does not say.
        layers: The layers in the file's order.
    """

    path: str
    kind: str
    facts: Mapping[str, str]
    target: float | None
    layers: tuple[InspectedLayer, ...]

    @property
    def realised(self) -> float:
        """Active over all weights of all layers."""
        return sum(layer.active for layer in self.layers) / sum(layer.weights for layer in self.layers)

    def problems(self) -> list[str]:
        """What is wrong with the topology, one line each; empty where it is healthy."""
        lines = []
        for layer in self.layers:
            if layer.active == 0:
                lines.append(f"{layer.name} has collapsed: no connection is left, and nothing passes")
            elif layer.dead_outputs or layer.dead_inputs:
                counts = (
                    (layer.dead_outputs, layer.shape[0], "outputs"),
                    (layer.dead_inputs, layer.shape[1], "inputs"),
                )
                parts = [f"{dead} of {units} {side}" for dead, units, side in counts if dead]
                lines.append(f"{layer.name} is not connected to {' and '.join(parts)}")
            if layer.leaks:
                lines.append(f"{layer.name} has {layer.leaks} inactive weights that are not zero")
        slack = len(self.layers) / sum(layer.weights for layer in self.layers)
        if self.target is not None and abs(self.realised - self.target) > slack:
            lines.append(f"the realised density {self.realised:.6g} is not the target {self.target:.6g}")
        return lines

    def renderable(self) -> Group:
        """Return the inspection as tables for ``rich``."""
        weights, active = (sum(getattr(layer, key) for layer in self.layers) for key in ("weights", "active"))
        target = "" if self.target is None else f" (target {self.target:.6g})"
        density = f"{self.realised:.6g}{target}, {active:,} of {weights:,} weights"
        facts = terminal_facts([*self.facts.items(), ("density", density)])
        rows = [("layer", "shape", "weights", "active", "density", "dead outputs", "dead inputs", "active zeros")]
        for layer in self.layers:
            zeros = "" if layer.zeros is None else f"{layer.zeros:,}"
            cells = (shape_text(layer.shape), f"{layer.weights:,}", f"{layer.active:,}", f"{layer.density:.4f}")
            rows.append((layer.name, *cells, str(layer.dead_outputs), str(layer.dead_inputs), zeros))
        problems = self.problems()
        health = Text("\n".join(problems), style="yellow") if problems else Text("no problem found", style="green")
        title = Text(f"\n{self.kind}\n", style="bold")
        return Group(title, facts, Text(), terminal_table(rows), Text(), health, Text(f"\n{self.path}", style="dim"))


def inspect_checkpoint(path: str | os.PathLike[str]) -> Inspection:
    """Read a file and look at its topology.

    Args:
        path: A Lightning checkpoint or one of your own loop that holds a ``Sparsifier.state_dict()``, such a state alone,
            a mask file, or a model's ``state_dict`` (its non-zeros are then taken for its connections); or a run's folder,
            whose last checkpoint is taken.

    Returns:
        What it holds.

    Raises:
        StateError: No such file, one that is damaged, that holds more than plain values and tensors, or no topology.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    content = load_checkpoint(path)
    found = _find_state(content, _DEPTH)
    if found is not None:
        where, state = found
        weights = _tensors(content.get("state_dict", content.get("model", {})))
        kind = "checkpoint of a sparse training" if where else "state of a sparsifier"
        return _of_state(str(path), kind, content, state, weights)
    tensors = _tensors(content)
    if tensors and len(tensors) == len(content) and all(t.dtype == torch.bool for t in tensors.values()):
        return Inspection(str(path), "masks", {}, None, _layers(str(path), tensors, {}, {}))
    tensors = tensors or _tensors(content.get("state_dict", {}))
    weights = {name: t for name, t in tensors.items() if t.ndim >= 2 and t.is_floating_point() and t.numel()}
    if not weights:
        raise StateError(f"{path} holds no topology: neither a sparsifier's state, nor masks, nor weights")
    masks = {name: tensor != 0 for name, tensor in weights.items()}
    kind = "weights alone; non-zeros are taken for connections, and ones that grew at zero are missed"
    return Inspection(str(path), kind, {}, None, _layers(str(path), masks, {}, weights))


def _find_state(value: Any, depth: int, where: str = "") -> tuple[str, Mapping[str, Any]] | None:
    if not isinstance(value, Mapping):
        return None
    if value.keys() >= _STATE_KEYS:
        return where, value
    if depth:
        for key, inner in value.items():
            if (found := _find_state(inner, depth - 1, f"{where}.{key}")) is not None:
                return found
    return None


def _tensors(value: Any) -> dict[str, Tensor]:
    if not isinstance(value, Mapping):
        return {}
    return {str(name): t for name, t in value.items() if isinstance(t, Tensor) and t.layout == torch.strided}


def _of_state(
    path: str, kind: str, content: Mapping[str, Any], state: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> Inspection:
    try:
        method = state["method"]
        target = float(method["density"])
        rows = {str(row["name"]): tuple(int(size) for size in row["shape"]) for row in state["layers"]}
        facts = {"method": str(method["name"]), "seed": str(state["seed"])}
        totals = state["total_steps"] if isinstance(state["total_steps"], list) else [state["total_steps"]]
        facts["step"] = " of ".join(", ".join(f"{int(x):,}" for x in numbers) for numbers in (state["steps"], totals))
        if isinstance(content.get("epoch"), int):
            facts["epoch"] = str(content["epoch"])
        skipped = f", {int(state['skipped'])} left out" if state["skipped"] else ""
        facts["topology updates"] = f"{int(state['updates'])}{skipped}"
        saved, union = _tensors(state["masks"]), _tensors(state["union"])
        shapes = {name: rows[name] if name in rows else tuple(mask.shape) for name, mask in saved.items()}
        for name, mask in saved.items():
            if not is_mask(mask, shapes[name]) or (name in union and not is_union(union[name], shapes[name])):
                found = f"has shape {tuple(mask.shape)}, not {shapes[name]}"
                what = f"the mask of {name} {found}" if mask.dtype == torch.bool else f"it has no mask of {name}"
                raise StateError(f"{path} is damaged: {what}")
        masks = {name: as_mask(mask, shapes[name]) for name, mask in saved.items()}
        union = {name: union_as_mask(u, shapes[name]) for name, u in union.items() if name in shapes}
        if union:
            sparse = [u for name, u in union.items() if name in masks and not bool(masks[name].all())]
            explored = sum(int(u.sum()) for u in sparse) / max(1, sum(u.numel() for u in sparse))
            facts["explored"] = f"{100 * explored:.2f}% of the weights of sparse layers"
        if not state["sparsified"]:
            facts["phase"] = "dense: the mask has not been made yet"
            target_now = None
        else:
            target_now = target if state.get("set_density") is None else float(state["set_density"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateError(
            f"{path} holds a sparsifier's state that is damaged: {type(error).__name__} {error}"
        ) from error
    return Inspection(path, kind, facts, target_now, _layers(path, masks, rows, weights))


def _layers(
    path: str, masks: Mapping[str, Tensor], rows: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]
) -> tuple[InspectedLayer, ...]:
    layers = []
    for label, parameter, part in _parts(masks, rows):
        if parameter not in masks or masks[parameter].dtype != torch.bool or masks[parameter].ndim < 2:
            raise StateError(f"{path} is damaged: it has no mask of {label}")
        mask = masks[parameter][part]
        if label in rows and tuple(mask.shape) != rows[label]:
            raise StateError(f"{path} is damaged: the mask of {label} has shape {tuple(mask.shape)}, not {rows[label]}")
        weight = weights.get(parameter)
        zeros: int | None = None
        leaks: int | None = None
        if weight is not None and weight.shape == masks[parameter].shape and weight.dtype != torch.bool:
            here = weight[part] != 0
            zeros, leaks = int((mask & ~here).sum()), int((here & ~mask).sum())
        dead = int(dead_outputs(mask).sum()), int(dead_inputs(mask).sum())
        layers.append(
            InspectedLayer(label, tuple(mask.shape), mask.numel(), int(mask.sum()), *dead, zeros=zeros, leaks=leaks)
        )
    if not layers:
        raise StateError(f"{path} holds no sparse layer")
    return tuple(layers)


def _parts(masks: Mapping[str, Tensor], rows: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, str, slice]]:
    """Label, parameter and rows of each layer; parts of a parameter follow upon each other in the table."""
    offsets: dict[str, int] = {}
    for label in rows or masks:
        whole = label in masks
        parameter = label if whole else label.rpartition("[")[0]
        if whole:
            yield label, parameter, slice(None)
        else:
            start = offsets.get(parameter, 0)
            offsets[parameter] = start + rows[label][0] if rows[label] else start
            yield label, parameter, slice(start, offsets[parameter])
