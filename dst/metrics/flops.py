"""FLOPs of inference and training as functions of the layers' densities.

Two figures stand side by side everywhere: what the sparse network needs in *theory*, and what the hardware really
*executes*. The masked backend multiplies by its zeros, so it executes the dense network's operations; a backend that
stores only non-zeros executes those of the sparse one. Conventions are those of ``dst.metrics.conventions``; functions that
take ``macs`` alone count two FLOPs per multiply-accumulate (MAC), and the backward pass costs twice the forward pass (Evci
et al. 2020, "Rigging the Lottery", appendix H). What no weight costs, such as attention scores, is passed as ``extra_flops``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from dst.errors import ConfigurationError
from dst.metrics.conventions import Convention, convention_of
from dst.metrics.counting import Operations
from dst.tables import aligned_table

SPARSE_EXECUTION: dict[str, bool] = {"masked": False, "latent": False, "csr": True}
"""Backend to whether it skips zeros in the layers that it stores; the others multiply by them."""


def executed_ratio(theoretical: float, backend: str) -> float:
    """What a backend executes of the dense network's operations, where ``theoretical`` of them are needed.

    Args:
        theoretical: Share of the dense network's operations that the sparse one needs, in [0, 1].
        backend: How weights are stored; see `SPARSE_EXECUTION`.

    Returns:
        1 for backends that multiply by zeros, else ``theoretical``.

    Raises:
        ConfigurationError: An unknown backend.
    """
    if backend not in SPARSE_EXECUTION:
        raise ConfigurationError(f"backend={backend!r} is unknown; choose from {', '.join(SPARSE_EXECUTION)}")
    return theoretical if SPARSE_EXECUTION[backend] else 1.0


@dataclass(frozen=True)
class FlopsRow:
    """One weight's operations, or those of a product without weights, per sample.

    Attributes:
        name: The weight's label, or the product's name.
        density: Share of active weights; None for products, which no mask makes cheaper.
        dense: Operations of the dense network.
        theoretical: Operations that the sparse network needs.
        executed: Operations that the backend carries out.
    """

    name: str
    density: float | None
    dense: float
    theoretical: float
    executed: float


@dataclass(frozen=True)
class FlopsTable:
    """Operations of one forward pass per sample, by layer and over all.

    A training step costs three times as much in each column (forward, and backward to inputs and to weights), but for
    steps that need the dense gradient; `dst.metrics.meter.FlopsMeter` adds up what ran.

    Attributes:
        convention: What counts as an operation.
        rows: Weights in the model's order, then products without weights.
        warnings: What is in no total, in words.
    """

    convention: Convention
    rows: tuple[FlopsRow, ...]
    warnings: tuple[str, ...]

    @property
    def dense(self) -> float:
        """The dense network's operations."""
        return sum(row.dense for row in self.rows)

    @property
    def theoretical(self) -> float:
        """The operations that the sparse network needs."""
        return sum(row.theoretical for row in self.rows)

    @property
    def executed(self) -> float:
        """The operations that the backend carries out."""
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
        densities: Label or parameter name -> density in [0, 1]; weights that are not named are dense.
        convention: A name in ``CONVENTIONS``, or a `Convention`.
        backend: How weights are stored; see `SPARSE_EXECUTION`.
        stored: Labels or parameter names of the layers whose non-zeros alone the backend computes; None takes all that
            have a density. Of no effect for backends that multiply by zeros.

    Returns:
        The table.

    Raises:
        ConfigurationError: A density out of range or of a layer that was not counted, an unknown convention or backend.
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
    """Raise ``ConfigurationError`` for a density out of [0, 1], or of a layer that was not counted."""
    known = {name for weight in operations.weights for name in (weight.label, weight.parameter)}
    for name, density in densities.items():
        if name not in known:
            raise ConfigurationError(f"{name} has a density, and no operator that uses it was counted")
        if not 0.0 <= density <= 1.0:
            raise ConfigurationError(f"the density of {name} must lie in [0, 1], got {density!r}")


def skips_zeros(operations: Operations, backend: str, stored: Iterable[str]) -> frozenset[str]:
    """Labels of the weights of which the backend computes the non-zeros alone.

    Args:
        operations: From `dst.metrics.count_operations`.
        backend: A name in `SPARSE_EXECUTION`.
        stored: Labels or parameter names that the backend stores.

    Raises:
        ConfigurationError: An unknown backend.
    """
    if backend not in SPARSE_EXECUTION:
        raise ConfigurationError(f"backend={backend!r} is unknown; choose from {', '.join(SPARSE_EXECUTION)}")
    if not SPARSE_EXECUTION[backend]:
        return frozenset()
    names = set(stored)
    return frozenset(w.label for w in operations.weights if w.label in names or w.parameter in names)
