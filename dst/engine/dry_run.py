"""``dst.plan``: a dry run that lists what would be sparse, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dst.backends.auto import Chooser, is_prepared
from dst.backends.csr_support import unsupported_reasons
from dst.backends.timing import input_shapes
from dst.engine.coverage import left_dense
from dst.method import Method, check_method
from dst.planning.first_mask import layer_counts
from dst.tables import aligned_table
from dst.topology.layers import Selector, SparseLayer, find_layers, sparse_modules


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
    where = _Where(model, method, layers, Chooser(batch_size, shapes=shapes))
    rows = []
    for layer, count in zip(layers, decided, strict=True):
        storage, note = where(layer, count)
        if storage == "dense" and (why := pattern.unsupported_reason(layer)):
            note += f": {why}"
        rows.append(PlanRow(layer.label, layer.kind, layer.shape, layer.weights, count, storage, note))
    rows += [_dense_row(d.name, d.kind, d.shape, d.reason) for d in dense]
    return Plan(tuple(rows), left_dense(layers, dense) or "")


class _Where:
    """Finds the backend of each layer, and the reason."""

    def __init__(self, model: nn.Module, method: Method, layers: Sequence[SparseLayer], choose: Chooser) -> None:
        self._backend, self._measured = method.backend, method.backend == "auto"
        self._unsupported = unsupported_reasons(model, layers) if method.backend in ("csr", "auto") else {}
        self._everywhere = ""
        if method.backend == "auto":
            self._everywhere = method.needs_inactive_weights() or ""
            self._chosen = is_prepared(model)
        self._modules, self._stored = dict(model.named_modules()), sparse_modules(model)
        self._choose = choose

    def __call__(self, layer: SparseLayer, count: int | None) -> tuple[str, str]:
        if count == layer.weights:
            return "dense", "stays dense"
        if reason := self._everywhere or self._unsupported.get(layer.label):
            return "masked", reason
        if not self._measured:
            return self._backend, ""
        if layer.parameter in self._stored:
            return "csr", ""
        if self._chosen:
            return "masked", "as it was prepared"
        if count is None:
            return "auto", "measured when scores have set its density"
        module = self._modules[layer.parameter.rpartition(".")[0]]
        sparse = self._choose(layer, module, count)
        return ("csr" if sparse else "masked"), self._choose.reasons[layer.label]


def _dense_row(name: str, kind: str, shape: tuple[int, ...], reason: str) -> PlanRow:
    weights = 1
    for size in shape:
        weights *= size
    return PlanRow(name, kind, shape, weights, weights, "dense", f"dense: {reason}")
