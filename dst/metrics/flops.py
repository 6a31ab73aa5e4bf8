"""FLOPs of a forward pass as a function of the densities of the layers.

Two figures are reported everywhere: the operations that the sparse network needs in *theory*, and those that the backend
*executes*. The masked backend multiplies by its zeros, so it executes the operations of the dense network. A backend that
stores only non-zeros executes those of the sparse network. Conventions are those of ``dst.metrics.conventions``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from dst.errors import ConfigurationError
from dst.metrics.conventions import Convention, convention_of
from dst.metrics.counting import Operations
from dst.tables import aligned_table

SPARSE_EXECUTION: dict[str, bool] = {"masked": False, "latent": False, "csr": True}
"""Backend -> whether it skips zeros in the layers that it stores. The others multiply by zeros."""


def executed_ratio(theoretical: float, backend: str) -> float:
    """Share of the dense network's operations that a backend executes.

    Args:
        theoretical: Share of the dense network's operations that the sparse one needs, in [0, 1].
        backend: Backend of the weights; a name in `SPARSE_EXECUTION`.

    Returns:
        1 for backends that multiply by zeros, otherwise ``theoretical``.

    Raises:
        ConfigurationError: If the backend is unknown.
    """
    if backend not in SPARSE_EXECUTION:
        raise ConfigurationError(f"backend={backend!r} is unknown; choose from {', '.join(SPARSE_EXECUTION)}")
    return theoretical if SPARSE_EXECUTION[backend] else 1.0


@dataclass(frozen=True)
class FlopsRow:
    """Operations per sample of one weight, or of a product without weights.

    Attributes:
        name: Label of the weight, or name of the product.
        density: Share of active weights; None for products, which no mask makes cheaper.
        dense: Operations of the dense network.
        theoretical: Operations that the sparse network needs.
        executed: Operations that the backend executes.
    """

    name: str
    density: float | None
    dense: float
    theoretical: float
    executed: float


@dataclass(frozen=True)
class FlopsTable:
    """Operations per sample of one forward pass, by layer and in total.

    A training step costs three times as much in each column: forward, backward to inputs, backward to weights. Steps that
    need the dense gradient cost more; `dst.metrics.FlopsMeter` adds up the steps of a training.

    Attributes:
        convention: The convention of counting.
        rows: Weights in the order of the model, then products without weights.
        warnings: Descriptions of what no total includes.
    """

    convention: Convention
    rows: tuple[FlopsRow, ...]
    warnings: tuple[str, ...]

    @property
    def dense(self) -> float:
        """Operations of the dense network."""
        return sum(row.dense for row in self.rows)

    @property
    def theoretical(self) -> float:
        """Operations that the sparse network needs."""
        return sum(row.theoretical for row in self.rows)

    @property
    def executed(self) -> float:
        """Operations that the backend executes."""
        return sum(row.executed for row in self.rows)

    def __str__(self) -> str:
        unit = self.convention.unit
        header = ("layer", "density", f"dense {unit}", "theoretical", "executed")
        total = FlopsRow("all", None, self.dense, self.theoretical, self.executed)
        lines = [header]
        for row in (*self.rows, total):
            density = "" if row.density is None else f"{row.density:.4f}"
            lines.append((row.name, density, f"{row.dense:,.0f}", f"{row.theoretical:,.0f}", f"{row.executed:,.0f}"))
        table = aligned_table(lines, right=range(1, len(header)))
        return "\n".join([f"{unit} per sample: {self.convention.description}", table, *self.warnings])


def flops_table(
    operations: Operations,
    densities: Mapping[str, float],
    *,
    convention: str | Convention = "flops",
    backend: str = "masked",
    stored: Collection[str] | None = None,
) -> FlopsTable:
    """List the operations of one forward pass, dense, theoretical and executed.

    Args:
        operations: From `dst.metrics.count_operations`.
        densities: Label or parameter name -> density in [0, 1]. Weights without an entry are dense.
        convention: A name in ``CONVENTIONS``, or a `Convention`.
        backend: Backend of the weights; a name in `SPARSE_EXECUTION`.
        stored: Labels or parameter names of the layers that the backend stores. Default: all with a density. Ignored for
            backends that multiply by zeros.

    Returns:
        The table.

    Raises:
        ConfigurationError: If a density is out of range or belongs to a layer that was not counted, or if the convention
            or the backend is unknown.
    """
    rule = convention_of(convention)
    check_densities(operations, densities)
    skipping = skips_zeros(operations, backend, densities if stored is None else stored)
    rows = []
    for weight in operations.weights:
        density = densities.get(weight.label, densities.get(weight.parameter, 1.0))
        fixed = rule.per_output * weight.outputs
        dense, sparse = (rule.per_mac * weight.macs * share + fixed for share in (1, density))
        rows.append(FlopsRow(weight.label, density, dense, sparse, sparse if weight.label in skipping else dense))
    for name, macs in operations.products.items():
        cost = rule.per_mac * macs
        rows.append(FlopsRow(name, None, cost, cost, cost))
    return FlopsTable(rule, tuple(rows), tuple(operations.warnings()))


def check_densities(operations: Operations, densities: Mapping[str, float]) -> None:
    """Raise ``ConfigurationError`` for a density outside [0, 1], or of a layer that was not counted."""
    known = {name for weight in operations.weights for name in (weight.label, weight.parameter)}
    for name, density in densities.items():
        if name not in known:
            raise ConfigurationError(f"{name} has a density, and no operator that uses it was counted")
        if not 0.0 <= density <= 1.0:
            raise ConfigurationError(f"the density of {name} must lie in [0, 1], got {density!r}")


def skips_zeros(operations: Operations, backend: str, stored: Iterable[str]) -> frozenset[str]:
    """Labels of the weights whose zeros the backend skips.

    Args:
        operations: From `dst.metrics.count_operations`.
        backend: A name in `SPARSE_EXECUTION`.
        stored: Labels or parameter names that the backend stores.

    Raises:
        ConfigurationError: If the backend is unknown.
    """
    if backend not in SPARSE_EXECUTION:
        raise ConfigurationError(f"backend={backend!r} is unknown; choose from {', '.join(SPARSE_EXECUTION)}")
    if not SPARSE_EXECUTION[backend]:
        return frozenset()
    names = set(stored)
    return frozenset(w.label for w in operations.weights if w.label in names or w.parameter in names)
