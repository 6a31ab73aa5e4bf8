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

FLOPS_PER_MAC = 2


def inference_flops(macs: Mapping[str, float], densities: Mapping[str, float], extra_flops: float = 0.0) -> float:
    """FLOPs of one sample's forward pass: ``2 · Σ macs · density + extra_flops``.

    Args:
        macs: Parameter name -> MACs per sample, from `layer_macs`.
        densities: Parameter name -> density in [0, 1]; layers that are not named are dense.
        extra_flops: FLOPs per sample that density does not change, such as bias additions and ReLU.

    Returns:
        FLOPs per sample, multiplications and additions.

    Raises:
        ConfigurationError: if a density is out of range or belongs to a layer without MACs.
    """
    for name, density in densities.items():
        if name not in macs:
            raise ConfigurationError(
                f"{name} has a density but no MACs: add them to macs, or leave it out of densities"
            )
        if not 0.0 <= density <= 1.0:
            raise ConfigurationError(f"the density of {name} must lie in [0, 1], got {density!r}")
    return FLOPS_PER_MAC * sum(count * densities.get(name, 1.0) for name, count in macs.items()) + extra_flops


def inference_ratio(macs: Mapping[str, float], densities: Mapping[str, float], extra_flops: float = 0.0) -> float:
    """`inference_flops` relative to the dense network, in [0, 1].

    Args:
        macs: As in `inference_flops`.
        densities: As in `inference_flops`.
        extra_flops: As in `inference_flops`; it stays in both terms of the ratio.

    Returns:
        Sparse over dense FLOPs.

    Raises:
        ConfigurationError: as `inference_flops`, or if the dense network costs nothing.
    """
    sparse = inference_flops(macs, densities, extra_flops)
    return sparse / _dense_flops(macs, extra_flops)


def training_ratio(
    macs: Mapping[str, float],
    densities: Mapping[str, float],
    step_counts: Mapping[str, int],
    extra_flops: float = 0.0,
) -> float:
    """FLOPs of a training run relative to as many steps of the dense network.

    With f_S and f_D the sparse and dense inference FLOPs, an ordinary sparse step costs 3·f_S, a step
    that needs the gradient of every weight 2·f_S + f_D, and a dense step 3·f_D (Evci et al. 2020,
    appendix H). The run counts as having had the given densities throughout.

    Args:
        macs: As in `inference_flops`.
        densities: As in `inference_flops`.
        step_counts: Optimizer steps of the kinds "sparse", "dense_gradient", "dense"; missing kinds are 0.
        extra_flops: As in `inference_flops`.

    Returns:
        The run's FLOPs over 3·f_D per step, in [0, 1].

    Raises:
        ConfigurationError: as `inference_ratio`, or if a kind of step is unknown, a count is negative or
            there was no step at all.
    """
    f_sparse = inference_flops(macs, densities, extra_flops)
    f_dense = _dense_flops(macs, extra_flops)
    costs = {"dense": 3 * f_dense, "sparse": 3 * f_sparse, "dense_gradient": 2 * f_sparse + f_dense}
    for kind, count in step_counts.items():
        if kind not in costs:
            raise ConfigurationError(f"unknown kind of step {kind!r}; known are {', '.join(costs)}")
        if count < 0:
            raise ConfigurationError(f"the number of {kind!r} steps must not be negative, got {count}")
    steps = sum(step_counts.values())
    if steps == 0:
        raise ConfigurationError("step_counts holds no step: there is no training to measure yet")
    return sum(costs[kind] * count for kind, count in step_counts.items()) / (steps * 3 * f_dense)


def rigl_training_flops(f_sparse: float, f_dense: float, update_every: int) -> float:
    """Mean FLOPs of a RigL training step: ``(3·f_S·ΔT + 2·f_S + f_D) / (ΔT + 1)``.

    Source: Evci et al. 2020, appendix H.

    Args:
        f_sparse: Inference FLOPs f_S of the sparse network.
        f_dense: Inference FLOPs f_D of the dense network.
        update_every: Steps ΔT between two updates of the topology, at least 1.

    Returns:
        FLOPs per sample and step.

    Raises:
        ConfigurationError: if ``update_every`` is less than 1.
    """
    if update_every < 1:
        raise ConfigurationError(f"update_every must be at least 1, got {update_every}")
    return (3 * f_sparse * update_every + 2 * f_sparse + f_dense) / (update_every + 1)


def static_training_flops(f_sparse: float) -> float:
    """FLOPs of a training step that never needs a dense gradient (static masks, SET): ``3·f_S``.

    Source: Evci et al. 2020, appendix H.

    Args:
        f_sparse: Inference FLOPs f_S of the sparse network.

    Returns:
        FLOPs per sample and step.
    """
    return 3 * f_sparse


def _dense_flops(macs: Mapping[str, float], extra_flops: float) -> float:
    flops = inference_flops(macs, {}, extra_flops)
    if flops <= 0:
        raise ConfigurationError("the dense network costs no FLOPs; measure macs with layer_macs first")
    return flops


SPARSE_EXECUTION: dict[str, bool] = {"masked": False, "latent": False, "csr": True}
"""Backend to whether it skips zeros in the layers that it stores; the others multiply by them."""


def executed_ratio(theoretical: float, backend: str) -> float:
    """What a backend executes of the dense network's operations, where ``theoretical`` of them are needed.

    Args:
        theoretical: From `inference_ratio`, in [0, 1].
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
