"""``dst.plan``: a dry run that lists what would be sparse, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dst.backends.auto import Chooser, is_prepared
from dst.backends.decision import Choose, Decision, decide
from dst.backends.timing import input_shapes
from dst.engine.coverage import left_dense
from dst.method import Method, check_method
from dst.planning.first_mask import layer_counts
from dst.tables import aligned_table
from dst.topology.layers import Selector, SparseLayer, find_layers


@dataclass(frozen=True)
class PlanRow:
    """One weight of the model.

    Attributes:
        name: Parameter name, with the part in brackets where it is one.
        kind: The owning module's class name.
        shape: Its shape.
        weights: Number of weights.
        active: Weights that will be active, or ``None`` where scores decide (global allocation).
        storage: ``"masked"``, ``"csr"``, ``"dense"`` if all weights stay active, or ``"auto"`` if it is measured once scores
            have decided how many are active.
        note: Why it stays dense or masked, or how fast csr was measured.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    active: int | None
    storage: str
    note: str


@dataclass(frozen=True)
class Plan:
    """The dry-run table; ``print`` it."""

    rows: tuple[PlanRow, ...]
    note: str = ""

    def __str__(self) -> str:
        header = ("weight", "module", "shape", "weights", "active", "density", "storage", "")
        table = [header]
        for row in self.rows:
            active = "by score" if row.active is None else f"{row.active:,}"
            density = "" if row.active is None or not row.weights else f"{row.active / row.weights:.4f}"
            shape = "×".join(map(str, row.shape))
            table.append((row.name, row.kind, shape, f"{row.weights:,}", active, density, row.storage, row.note))
        text = aligned_table(table, right={3, 4, 5})
        return f"{text}\n\n{self.note}" if self.note else text


def plan(
    model: nn.Module,
    method: Method,
    *,
    include: Iterable[Selector] | None = None,
    exclude: Iterable[Selector] | None = None,
    batch_size: int | None = None,
    example: Any = None,
) -> Plan:
    """List what a method would make sparse in a model, without changing it (the model may be on the meta device).

    Args:
        model: Any module.
        method: The method.
        include: As for ``Sparsifier``.
        exclude: As for ``Sparsifier``.
        batch_size: As for ``dst.prepare``; only ``backend="auto"`` measures.
        example: As for ``dst.prepare``.

    Returns:
        One row per weight with two dimensions or more, sparse ones first.

    Raises:
        ConfigurationError: As for ``Sparsifier``: an infeasible budget, a selector that selects nothing, …
    """
    check_method(method)
    layers, dense = find_layers(model, include, exclude)
    counts = layer_counts(method, layers, method.density)
    pattern = method.pattern.for_density(method.density) if method.density < 1 else method.pattern
    decided: list[int | None] = [None] * len(layers) if counts is None else list(counts)
    shapes = input_shapes(model, example) if example is not None and method.backend == "auto" else None
    decisions = _decisions(model, method, layers, decided, Chooser(batch_size, shapes=shapes))
    rows = []
    for layer, count in zip(layers, decided, strict=True):
        storage, note = decisions[layer.label]
        if storage == "dense" and (why := pattern.unsupported_reason(layer)):
            note += f": {why}"
        rows.append(PlanRow(layer.label, layer.kind, layer.shape, layer.weights, count, storage, note))
    rows += [_dense_row(d.name, d.kind, d.shape, d.reason) for d in dense]
    return Plan(tuple(rows), left_dense(layers, dense) or "")


def _decisions(
    model: nn.Module,
    method: Method,
    layers: Sequence[SparseLayer],
    counts: Sequence[int | None],
    measure: Choose,
) -> dict[str, Decision]:
    """The storage of each layer, as ``dst.prepare`` decides it, and the reason."""

    def masked(layers: Sequence[SparseLayer], module: nn.Module, active: int) -> Decision:
        return Decision("masked", "as it was prepared")

    if method.backend not in ("csr", "auto"):
        found = {layer.label: Decision(method.backend, "") for layer in layers}
    elif method.backend == "auto" and (reason := method.needs_inactive_weights()):
        found = {layer.label: Decision("masked", reason) for layer in layers}
    elif method.backend == "csr":
        found = decide(model, layers, counts)
    else:
        found = decide(model, layers, counts, masked if is_prepared(model) else measure)
    whole = {x.label: Decision("dense", "stays dense") for x, n in zip(layers, counts, strict=True) if n == x.weights}
    return found | whole


def _dense_row(name: str, kind: str, shape: tuple[int, ...], reason: str) -> PlanRow:
    weights = 1
    for size in shape:
        weights *= size
    return PlanRow(name, kind, shape, weights, weights, "dense", f"dense: {reason}")
