"""A dry run: what would be sparse, and how much, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from dst.allocation import planned_counts
from dst.backends.csr import obstacles
from dst.layers import Selector, find_layers
from dst.method import Method


@dataclass(frozen=True)
class PlanRow:
    """One weight of the model.

    Attributes:
        name: Parameter name, with the part in brackets where it is one.
        kind: The owning module's class name.
        shape: Its shape.
        weights: Number of weights.
        active: Weights that will be active, or ``None`` where scores decide (global allocation).
        storage: ``"masked"``, ``"csr"``, or ``"dense"`` where it keeps all its weights.
        note: Why it stays dense or masked, or what else there is to say.
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

    def __str__(self) -> str:
        header = ("weight", "module", "shape", "weights", "active", "density", "storage", "")
        table = [header]
        for row in self.rows:
            active = "by score" if row.active is None else f"{row.active:,}"
            density = "" if row.active is None or not row.weights else f"{row.active / row.weights:.4f}"
            shape = "×".join(map(str, row.shape))
            table.append((row.name, row.kind, shape, f"{row.weights:,}", active, density, row.storage, row.note))
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        right = {3, 4, 5}
        lines = [
            "  ".join(
                c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in table
        ]
        return "\n".join(line.rstrip() for line in lines)


def plan(
    model: nn.Module,
    method: Method,
    *,
    include: Iterable[Selector] | None = None,
    exclude: Iterable[Selector] | None = None,
) -> Plan:
    """List what a method would make sparse in a model, without touching it (the model may be on the meta device).

    Args:
        model: Any module.
        method: The method.
        include: As for ``Sparsifier``.
        exclude: As for ``Sparsifier``.

    Returns:
        One row per weight with two dimensions or more, sparse ones first.

    Raises:
        ConfigurationError: As for ``Sparsifier``: an infeasible budget, a selector that selects nothing, …
    """
    layers, dense = find_layers(model, include, exclude)
    counts = planned_counts(
        method.allocation, [layer.label for layer in layers], [layer.shape for layer in layers], method.density
    )
    decided: list[int | None] = [None] * len(layers) if counts is None else list(counts)
    barred = obstacles(model, layers) if method.backend == "csr" else {}
    rows = []
    for layer, count in zip(layers, decided, strict=True):
        storage, note = method.backend, ""
        if count == layer.weights:
            storage, note = "dense", "stays dense"
        elif reason := barred.get(layer.label):
            storage, note = "masked", reason
        rows.append(PlanRow(layer.label, layer.kind, layer.shape, layer.weights, count, storage, note))
    rows += [_dense_row(d.name, d.kind, d.shape, d.reason) for d in dense]
    return Plan(tuple(rows))


def _dense_row(name: str, kind: str, shape: tuple[int, ...], reason: str) -> PlanRow:
    weights = 1
    for size in shape:
        weights *= size
    return PlanRow(name, kind, shape, weights, weights, "dense", f"dense: {reason}")
