"""Inspecting a checkpoint: its layers, their densities and their health. Nothing in the file is executed."""

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
"""Levels of nesting that are searched for a sparsifier's state. Lightning has it at ``callbacks.SparseTraining``."""


@dataclass(frozen=True)
class InspectedLayer:
    """One layer's connections.

    Attributes:
        name: The layer's label.
        shape: Shape (out, in, ...), or (in, out, ...) of a transposed convolution.
        weights: Number of weights.
        active: Number of active weights.
        dead_outputs: Number of units of the first dimension without a connection.
        dead_inputs: Number of units of the second dimension without a connection. The second dimension of a grouped
            convolution is the inputs within a group.
        zeros: Number of active weights that are exactly zero, as newly grown weights are. None if the file has no weights.
        leaks: Number of inactive weights that are not zero, which is an error. None if the file has no weights.
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
        """Active weights / weights, in [0, 1]."""
        return self.active / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's topology.

    Attributes:
        path: The file.
        kind: What the file is, in words.
        facts: What the file tells about the run, name to value. May be empty.
        target: The density that the method was set to. None if the file does not tell.
        layers: The layers, in the file's order.
    """

    path: str
    kind: str
    facts: Mapping[str, str]
    target: float | None
    layers: tuple[InspectedLayer, ...]

    @property
    def realised(self) -> float:
        """Active weights / weights of all layers, in [0, 1]."""
        return sum(layer.active for layer in self.layers) / sum(layer.weights for layer in self.layers)

    def problems(self) -> list[str]:
        """Problems of the topology, one line each. Empty if it is healthy."""
        lines = []
        for layer in self.layers:
            if layer.active == 0:
                lines.append(f"{layer.name} has collapsed: no connection is left")
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
    """Inspect the topology in a file.

    Args:
        path: One of

            - a checkpoint that holds a ``Sparsifier.state_dict()``, from Lightning or a loop of your own;
            - such a state alone;
            - a mask file;
            - a model's ``state_dict``, whose non-zeros are taken as its connections;
            - a run's folder, of which the last checkpoint is inspected.

    Returns:
        The inspection.

    Raises:
        StateError: The file is missing, is damaged, holds more than plain values and tensors, or holds no topology.
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
    kind = "weights alone: non-zeros count as connections, and newly grown weights, which are zero, do not"
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
    """Label, parameter and rows of each layer. The parts of a parameter follow each other in the table."""
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
