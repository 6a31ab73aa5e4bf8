"""The steps of one optimizer: its layers, its step counter, and what is due when."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dst.engine.optimizers import holders
from dst.engine.state import are_counts, are_densities
from dst.errors import StateError
from dst.method import Method
from dst.pieces.durations import resolve_steps
from dst.topology.layers import SparseLayer
from dst.topology.sharding import local

logger = logging.getLogger("dst.engine.sparsifier")


@dataclass(frozen=True)
class PreparedStep:
    """What ``before_step`` prepared for the optimizer's step.

    Attributes:
        kind: What the step costs: ``"dense"``, ``"sparse"`` or ``"dense_gradient"``.
        replaced: Whether an update replaces the step, which then has no gradients.
        active: Active weights in its forward and backward passes, for each of the optimizer's layers.
        seen: A fingerprint of the weights, if the step prepared before this one was not taken.
        moves: How often the weights have changed since without a step of this optimizer.
    """

    kind: str
    replaced: bool
    active: list[int]
    seen: list[str] | None = None
    moves: int = 0


@dataclass(frozen=True)
class _Milestones:
    """What a training of ``total`` steps settles beforehand; see the properties of ``OptimizerSteps``."""

    total: int
    mask_step: int
    stop_step: int
    settles_at: int | None

    @classmethod
    def of(cls, method: Method, total: int) -> _Milestones:
        """The milestones of a method in a training of ``total`` steps."""
        stop, settles_at = method.clock.stop_step(total), None
        if method.schedule is not None:
            settles_at = min(max(stop, method.schedule.settles_at(total)), total - 1)
        elif method.surplus is not None:
            settles_at = min(stop, total - 1)
        return cls(total, resolve_steps(method.sparsify_at, total, "sparsify_at"), stop, settles_at)


@dataclass
class OptimizerSteps:
    """The steps of an optimizer that holds sparse parameters.

    Attributes:
        method: The method.
        optimizer: The optimizer.
        layers: Indices of the layers that it moves.
        parameters: Their parameters.
        total: Its steps in the whole training.
        step: Steps taken.
        updated_at: The step of the last update. If the step is not taken, its next attempt makes no second update.
        budget_density: The network's density that the budgets of its layers were split from.
        prepared: The step to come, once ``before_step`` was called for it.
        is_stepping: Whether ``optimizer.step()`` was entered and has not been counted.
    """

    method: Method
    optimizer: Optimizer
    layers: list[int]
    parameters: list[nn.Parameter]
    total: int
    step: int = 0
    updated_at: int = -1
    budget_density: float | None = None
    prepared: PreparedStep | None = None
    is_stepping: bool = False
    # Asked for several times per step, and computed once: for this total, and for this (step, total).
    _milestones: _Milestones | None = field(default=None, init=False, repr=False, compare=False)
    _fires: tuple[int, int, bool] = field(default=(-1, -1, False), init=False, repr=False, compare=False)

    def _known(self) -> _Milestones:
        """The milestones of a training of ``total`` steps."""
        if self._milestones is None or self._milestones.total != self.total:
            self._milestones = _Milestones.of(self.method, self.total)
        return self._milestones

    @property
    def fires(self) -> bool:
        """Whether the clock fires at the coming step."""
        step, total, fires = self._fires
        if step != self.step or total != self.total:
            fires = self.method.clock.fires(self.step, self.total)
            self._fires = self.step, self.total, fires
        return fires

    @property
    def mask_step(self) -> int:
        """The step at which the first mask is made."""
        return self._known().mask_step

    @property
    def stop_step(self) -> int:
        """The first step from which on the clock never fires."""
        return self._known().stop_step

    @property
    def settles_at(self) -> int | None:
        """The step of the last update of a moving budget, which is final from there; ``None`` for a constant budget."""
        return self._known().settles_at

    @property
    def ever_updates(self) -> bool:
        """Whether an update falls within the training. Step 0 does not count: nothing was trained yet."""
        fires = any(self.method.clock.fires(step, self.total) for step in range(1, self.total))
        return fires or self.settles_at is not None or self.total <= 1

    @property
    def has_settled(self) -> bool:
        """Whether a moving budget is final."""
        settles_at = self.settles_at
        return settles_at is None or self.updated_at >= settles_at

    @property
    def is_due(self) -> bool:
        """Whether the coming step updates the topology and has not done so in an earlier attempt."""
        if self.updated_at == self.step:
            return False
        if self.fires:
            return True
        settles_at = self.settles_at  # an update skipped there is made later
        return settles_at is not None and self.updated_at < settles_at <= self.step

    @property
    def may_update(self) -> bool:
        """Whether the clock fires at this step or a later one."""
        return self.step < self.stop_step

    @property
    def moves_inactive(self) -> bool:
        """Whether inactive weights are trained and may become active."""
        return self.method.moves_inactive and self.may_update

    def reads_inactive(self, is_sparse: bool) -> bool:
        """Whether the coming step reads gradients of inactive weights.

        Args:
            is_sparse: Whether the first mask was made.
        """
        if not is_sparse or self.moves_inactive:
            return True
        if any(score.needs_gradient for score in self.method.observers.values()):
            return self.may_update
        # If an update does not replace the step, the step moves the grown weights by their gradients.
        return (not self.method.replace_step or self.method.reads_gradient) and self.is_due

    def waits(self) -> tuple[bool, int]:
        """Whether the last prepared step was not taken, and how often weights moved since without one."""
        if self.prepared is None:
            return False, 0
        if self.prepared.seen is None:
            return True, 0
        return True, self.prepared.moves + 1 if fingerprint(self.parameters) != self.prepared.seen else 0

    def gradients(self) -> Iterable[Tensor]:
        """The gradients of all parameters of the optimizer, dense ones included."""
        return (p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None)

    def drop_gradients(self) -> None:
        """Set all gradients of the optimizer to ``None``."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def assign(
    method: Method,
    optimizers: Sequence[Optimizer],
    totals: Sequence[int],
    layers: Sequence[SparseLayer],
    parameters: Mapping[str, nn.Parameter],
) -> list[OptimizerSteps]:
    """Assign each layer to the optimizer that holds its parameter.

    Args:
        method: The method.
        optimizers: The optimizers.
        totals: The number of steps of each.
        layers: All sparse layers.
        parameters: Name to parameter.

    Returns:
        The steps of those optimizers that hold sparse parameters.
    """
    held = holders(optimizers, parameters)
    result = []
    for i, optimizer in enumerate(optimizers):
        mine = [k for k, layer in enumerate(layers) if held[layer.parameter] == i]
        names = dict.fromkeys(layers[k].parameter for k in mine)
        if mine:
            result.append(OptimizerSteps(method, optimizer, mine, [parameters[name] for name in names], totals[i]))
    return result


def fingerprint(parameters: Iterable[Tensor]) -> list[str]:
    """A value that changes when weights do; text, so that NaN equals itself."""
    return [repr(float(local(p.detach()).sum(dtype=torch.float64))) for p in parameters]


def state_of_steps(steppers: Sequence[OptimizerSteps]) -> dict[str, Any]:
    """The optimizers' steps as plain values, for checkpoints."""
    totals, densities = [s.total for s in steppers], [s.budget_density for s in steppers]
    return {
        "total_steps": totals[0] if len(totals) == 1 else totals,
        "steps": [s.step for s in steppers],
        "updated_at": [s.updated_at for s in steppers],
        "budget_density": densities[0],
        "budget_densities": densities,
    }


STEP_KEYS = {"total_steps", "steps", "updated_at", "budget_density"}
"""The keys of ``state_of_steps`` that every saved state has."""


def check_steps(state: Mapping[str, Any], steppers: Sequence[OptimizerSteps]) -> None:
    """Raise ``StateError`` for a state that ``state_of_steps`` cannot return for these optimizers.

    Args:
        state: A saved state.
        steppers: The optimizers of this run.
    """
    steps, totals, updated_at = state["steps"], state["total_steps"], state["updated_at"]
    if not are_counts(steps):
        raise StateError("the state is damaged: steps must be counts")
    if len(steps) != len(steppers):
        raise StateError(f"the checkpoint has {len(steps)} optimizers, this run {len(steppers)}")
    first, densities = state["budget_density"], state.get("budget_densities", [None] * len(steps))
    several = isinstance(totals, list)
    wrong = {
        "total_steps": not are_counts(totals if several else [totals]) or (several and len(totals) != len(steps)),
        "updated_at": not isinstance(updated_at, list)
        or len(updated_at) != len(steps)
        or not all(isinstance(s, int) for s in updated_at),
        "budget_density": first is not None and not (isinstance(first, float) and 0 < first <= 1),
        "budget_densities": not are_densities(densities, optional=True) or len(densities) != len(steps),
    }
    if damaged := [key for key, is_wrong in wrong.items() if is_wrong]:
        raise StateError(f"the state is damaged: {', '.join(damaged)} cannot be such")
    here = [s.total for s in steppers]
    if (totals if several else [totals] * len(here)) != here:
        logger.warning(
            "the checkpoint's schedules were laid out for %s steps and go on for %s", totals, ", ".join(map(str, here))
        )


def load_steps(steppers: Sequence[OptimizerSteps], state: Mapping[str, Any]) -> None:
    """Continue from ``state_of_steps``, over the lengths of this run."""
    densities = state.get("budget_densities", [state["budget_density"]] * len(steppers))
    for s, step, updated_at, density in zip(steppers, state["steps"], state["updated_at"], densities, strict=True):
        s.step, s.updated_at, s.budget_density, s.prepared = int(step), int(updated_at), density, None
