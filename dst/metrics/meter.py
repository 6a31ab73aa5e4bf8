"""Training FLOPs, counted step by step at the density of each step."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dst.errors import ConfigurationError, StateError
from dst.metrics.conventions import Convention, convention_of
from dst.metrics.counting import Operations, WeightOperations
from dst.metrics.flops import skips_zeros

KINDS = ("dense", "sparse", "dense_gradient")
"""Kinds of steps by cost, the keys of ``Sparsifier.step_counts``."""


@dataclass(frozen=True)
class TrainingFlops:
    """Operations of a training so far, in total or of one layer.

    Attributes:
        dense: Operations of the same number of steps of the dense network.
        theoretical: Operations that the steps need in theory.
        executed: Operations that the backend executed.
    """

    dense: float
    theoretical: float
    executed: float

    @property
    def ratio(self) -> float:
        """Theoretical over dense."""
        return self.theoretical / self.dense

    @property
    def executed_ratio(self) -> float:
        """Executed over dense; 1 for backends that multiply by zeros."""
        return self.executed / self.dense


class FlopsMeter:
    """Adds up the operations of training steps at the densities of the steps.

    Let f_S and f_D be the sparse and the dense forward cost of a layer. An ordinary sparse step costs 3·f_S (forward,
    backward to inputs, backward to weights), a step that needs the gradient of every weight 2·f_S + f_D, and a dense step
    3·f_D (Evci et al. 2020, "Rigging the Lottery", appendix H, https://arxiv.org/abs/1911.11134). Products without weights
    cost three times their forward pass. The meter counts weights per pass in integers, so sums over millions of steps are
    exact.

    ```python
    meter = FlopsMeter(count_operations(model, (1, 28, 28)), backend=method.backend, samples_per_step=128)
    meter.observe(sparsifier)                  # before the first step
    for batch in batches:
        ...
        optimizer.step()
        meter.observe(sparsifier)              # or after every step that may change the number of active weights
    print(meter.total("rigl").theoretical)
    ```

    Args:
        operations: Result of `dst.metrics.count_operations` for the dense model.
        backend: Backend of the weights; a name in ``dst.metrics.flops.SPARSE_EXECUTION``.
        stored: Labels or parameter names of the layers that the backend stores. Default: all.
        samples_per_step: Samples per optimizer step: batch size times accumulated batches times processes.

    Raises:
        ConfigurationError: If the backend is unknown, or ``samples_per_step`` is below 1.
    """

    def __init__(
        self,
        operations: Operations,
        *,
        backend: str = "masked",
        stored: Collection[str] | None = None,
        samples_per_step: int = 1,
    ) -> None:
        if samples_per_step < 1:
            raise ConfigurationError(f"samples_per_step must be at least 1, got {samples_per_step}")
        self.operations = operations
        self.samples_per_step = samples_per_step
        labels = [weight.label for weight in operations.weights]
        self._skipping = skips_zeros(operations, backend, labels if stored is None else stored)
        self._theoretical = dict.fromkeys(labels, 0)  # weights used in a pass, summed over passes
        self._executed = dict.fromkeys(labels, 0)
        self._steps = 0
        self._last: tuple[dict[str, int], dict[str, int]] | None = (
            None  # step counts added so far; active weights since then
        )
        self._seen: dict[str, int] = {}  # step counts of the last observation

    @property
    def steps(self) -> int:
        """Number of optimizer steps added."""
        self._settle()
        return self._steps

    def add(self, kind: str, active: Mapping[str, int], steps: int = 1) -> None:
        """Add steps of one kind.

        Args:
            kind: "dense", "sparse" or "dense_gradient".
            active: Label -> number of active weights during the steps. Layers without an entry are dense. Ignored for dense
                steps.
            steps: Number of steps, >= 0.

        Raises:
            ConfigurationError: If the kind is unknown, a number is out of range, or a layer was not counted.
        """
        known = {weight.label: weight.weights for weight in self.operations.weights}
        for name, count in active.items():
            if not 0 <= count <= known.get(name, count):
                raise ConfigurationError(f"{name} has {known[name]} weights; {count} of them cannot be active")
        self._add(kind, {name: count * steps for name, count in active.items()}, steps)

    def add_work(self, work: Mapping[str, Mapping[str, int]], step_counts: Mapping[str, int]) -> None:
        """Add a whole training from the counts of its ``Sparsifier``.

        Args:
            work: ``sparsifier.work``: kind of step -> label -> active weights, summed over steps.
            step_counts: ``sparsifier.step_counts``.

        Raises:
            ConfigurationError: As `add`.
        """
        labels = {weight.label for weight in self.operations.weights}
        for kind, steps in step_counts.items():
            active = {k: v for k, v in work.get(kind, {}).items() if k in labels}
            self._add(kind, active, steps)

    def _add(self, kind: str, active: Mapping[str, int], steps: int) -> None:
        """Add steps of one kind. ``active`` is summed over them."""
        if kind not in KINDS:
            raise ConfigurationError(f"unknown kind of step {kind!r}; known are {', '.join(KINDS)}")
        if steps < 0:
            raise ConfigurationError(f"the number of {kind!r} steps must not be negative, got {steps}")
        known = {weight.label: weight.weights for weight in self.operations.weights}
        for name in active:
            if name not in known:
                raise ConfigurationError(f"{name} has active weights, and no operator that uses it was counted")
        for label, weights in known.items():
            dense = weights * steps
            sparse = dense if kind == "dense" else active.get(label, dense)
            passes = 2 * sparse + (sparse if kind == "sparse" else dense)
            self._theoretical[label] += passes
            self._executed[label] += passes if label in self._skipping else 3 * dense
        self._steps += steps

    def observe(self, sparsifier: Any) -> None:
        """Add the steps that a ``Sparsifier`` took since the last call, at the densities of that call.

        Call it before the first step, and then after every step or at least after every step that changes the number of
        active weights. The forward pass of a step runs before its update, so a step counts at the density before it.

        Args:
            sparsifier: An object with ``step_counts`` and ``layer_table()`` of ``Sparsifier``.

        Raises:
            StateError: If the first call comes after a step, or the sparsifier has gone back to an earlier step.
        """
        counts = dict(sparsifier.step_counts)
        active = _active(sparsifier.layer_table(), self._theoretical)
        if self._last is None and sum(counts.values()) != self._steps:
            raise StateError(
                f"{sum(counts.values())} steps ran and the meter knows of {self._steps}: observe the sparsifier before its "
                "first step, or load the meter's state where you load the sparsifier's"
            )
        if self._last is not None and any(count < self._seen[kind] for kind, count in counts.items()):
            raise StateError("the sparsifier went back in time: load the meter's state where you load the sparsifier's")
        self._seen = counts  # steps of equal densities are added later, all at once
        if self._last is None or active != self._last[1]:
            self._settle()
            self._last = counts, active

    def _settle(self) -> None:
        """Add the steps since the numbers of active weights last changed."""
        if self._last is None:
            return
        (before, held), seen = self._last, self._seen
        self._last = seen, held
        for kind, count in seen.items():
            if count != before[kind]:
                self.add(kind, held, count - before[kind])

    def total(self, convention: str | Convention = "flops") -> TrainingFlops:
        """Return the operations over all steps and samples.

        Args:
            convention: A name in ``CONVENTIONS``, or a `Convention`.
        """
        parts = self.layers(convention).values()
        return TrainingFlops(
            sum(p.dense for p in parts), sum(p.theoretical for p in parts), sum(p.executed for p in parts)
        )

    def layers(self, convention: str | Convention = "flops") -> dict[str, TrainingFlops]:
        """Return label, or name of a product without weights -> operations over all steps and samples."""
        rule = convention_of(convention)
        self._settle()
        result = {w.label: self._layer(w, rule) for w in self.operations.weights}
        for name, macs in self.operations.products.items():
            cost = float(3 * rule.per_mac * macs * self._steps * self.samples_per_step)
            result[name] = TrainingFlops(cost, cost, cost)
        return result

    def _layer(self, weight: WeightOperations, rule: Convention) -> TrainingFlops:
        fixed = 3 * self._steps * rule.per_output * weight.outputs

        def cost(passes: int) -> float:
            macs = Fraction(passes * weight.macs, weight.weights) if weight.weights else 0
            return float((rule.per_mac * macs + fixed) * self.samples_per_step)

        return TrainingFlops(
            cost(3 * weight.weights * self._steps),
            cost(self._theoretical[weight.label]),
            cost(self._executed[weight.label]),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values, for `load_state_dict`."""
        self._settle()
        last = None if self._last is None else [dict(part) for part in self._last]
        return {
            "steps": self._steps,
            "theoretical": dict(self._theoretical),
            "executed": dict(self._executed),
            "last": last,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a result of `state_dict`.

        Raises:
            StateError: If the state belongs to another model, or is not the state of a meter.
        """
        if not {"steps", "theoretical", "executed", "last"} <= state.keys():
            raise StateError("this is not the state of a FlopsMeter, or it is damaged")
        if state["theoretical"].keys() != self._theoretical.keys():
            different = ", ".join(sorted(state["theoretical"].keys() ^ self._theoretical.keys()))
            raise StateError(f"the state is of a meter of other layers: {different} differ")
        self._steps = int(state["steps"])
        self._theoretical = dict(state["theoretical"])
        self._executed = dict(state["executed"])
        last = state["last"]
        self._last = None if last is None else (dict(last[0]), dict(last[1]))
        self._seen = {} if last is None else dict(last[0])


def _active(table: Sequence[Mapping[str, Any]], labels: Container[str]) -> dict[str, int]:
    """Active weights by label, of the layers that were counted."""
    return {row["name"]: row["nonzero"] for row in table if row["name"] in labels}
