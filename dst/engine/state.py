"""The changing state of a training beside masks and steps: one record that saves, loads and checks itself."""

# ruff: noqa: RUF009 (`_saved` returns a dataclass field)

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from dst.errors import StateError

STEP_KINDS = ("dense", "sparse", "dense_gradient")


@dataclass(frozen=True)
class Update:
    """A topology update.

    Attributes:
        step: The optimizer step.
        fraction: The drop fraction.
        churn: Grown / active weights, in [0, 1].
    """

    step: int
    fraction: float
    churn: float


def is_number(value: Any) -> bool:
    """Whether a saved value is a number, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def are_counts(values: Any) -> bool:
    """Whether a saved value is a list of whole numbers >= 0."""
    return isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)


def are_densities(values: Any, *, optional: bool) -> bool:
    """Whether a saved value is a list of densities, or of ``None`` where ``optional``."""
    return isinstance(values, list) and all((optional and v is None) or (is_number(v) and 0 < v <= 1) for v in values)


def _are_splits(splits: Any) -> bool:
    """Lists of a density, the budgets of all layers, and numbers of optimizers."""
    return isinstance(splits, list) and all(
        isinstance(split, (list, tuple))
        and len(split) == 3
        and are_densities([split[0]], optional=False)
        and are_counts(split[1])
        and are_counts(split[2])
        for split in splits
    )


def _is_update(last: Any) -> bool:
    return last is None or (isinstance(last, (list, tuple)) and len(last) == 3 and all(map(is_number, last)))


def _is_work(work: Any, labels: Sequence[str]) -> bool:
    return work.keys() <= set(STEP_KINDS) and all(are_counts(w) and len(w) == len(labels) for w in work.values())


def _are_buffers(buffers: Any) -> bool:
    return all(isinstance(buffer, Tensor) for buffer in buffers.values())


_REQUIRED: Any = object()


def _saved(
    fits: Callable[[Any, Sequence[str]], bool],
    save: Callable[[Any], Any] = lambda value: value,
    load: Callable[[Any], Any] = lambda value: value,
    absent: Any = _REQUIRED,
    **default: Any,
) -> Any:
    """A field of the state.

    Args:
        fits: Whether a saved value can be that of a model with these layers.
        save: From the value to plain values and tensors.
        load: From those to the value.
        absent: What is loaded from a state that lacks the field.
        default: ``default`` or ``default_factory``.
    """
    return field(metadata={"fits": fits, "save": save, "load": load, "absent": absent}, **default)


def _count(**options: Any) -> Any:
    return _saved(lambda n, labels: are_counts([n]), load=int, default=0, **options)


@dataclass
class TrainingState:
    """Counters, budgets, and what an update leaves for the next.

    Attributes:
        sparsified: Whether the first mask was made.
        updates: Topology updates made.
        skipped: Updates that were due and left out.
        settings: How often the user set the density.
        step_counts: Kind of step to number of steps.
        work: Kind of step to active weights of each layer, summed over its steps.
        last_update: The last update.
        set_density: The density that the user set; it replaces the method's schedule.
        budgets: Layer label to its budget.
        splits: Density of the network to the budgets of all layers, and the optimizers whose layers have them.
        amount: The state of the method's ``amount``.
        buffers: Role and layer label to the observer's buffer.
    """

    sparsified: bool = _saved(lambda x, labels: isinstance(x, bool), default=False)
    updates: int = _count()
    skipped: int = _count()
    settings: int = _count(absent=0)
    step_counts: dict[str, int] = _saved(
        lambda x, labels: x.keys() == set(STEP_KINDS) and are_counts(list(x.values())),
        dict,
        dict,
        default_factory=lambda: dict.fromkeys(STEP_KINDS, 0),
    )
    last_update: Update | None = _saved(
        lambda x, labels: _is_update(x),
        lambda x: None if x is None else [x.step, x.fraction, x.churn],
        lambda x: None if x is None else Update(int(x[0]), float(x[1]), float(x[2])),
        default=None,
    )
    set_density: float | None = _saved(
        lambda x, labels: x is None or (isinstance(x, float) and are_densities([x], optional=False)), default=None
    )
    splits: dict[float, tuple[tuple[int, ...], set[int]]] = _saved(
        lambda x, labels: _are_splits(x),
        lambda x: [[d, list(counts), sorted(users)] for d, (counts, users) in x.items()],
        lambda x: {d: (tuple(counts), set(users)) for d, counts, users in x},
        absent=[],
        default_factory=dict,
    )
    budgets: dict[str, int] = _saved(
        lambda x, labels: x.keys() == set(labels) and are_counts(list(x.values())), dict, dict, default_factory=dict
    )
    amount: float = _saved(lambda x, labels: is_number(x), load=float, default=0.0)
    work: dict[str, list[int]] = _saved(
        _is_work,
        lambda x: {kind: list(active) for kind, active in x.items()},
        lambda x: {kind: list(active) for kind, active in x.items()},
        default_factory=dict,
    )
    buffers: dict[tuple[str, str], Tensor] = _saved(
        lambda x, labels: _are_buffers(x),
        lambda x: {role + "/" + label: buffer.clone() for (role, label), buffer in x.items()},
        lambda x: {(key.partition("/")[0], key.partition("/")[2]): buffer.clone() for key, buffer in x.items()},
        default_factory=dict,
    )

    def count(self, kind: str, layers: Sequence[int], active: Sequence[int], of: int) -> None:
        """Count an optimizer step.

        Args:
            kind: What it cost, of ``STEP_KINDS``.
            layers: Indices of the layers that it moved.
            active: Active weights of each of them.
            of: Number of all layers.
        """
        self.step_counts[kind] += 1
        work = self.work.setdefault(kind, [0] * of)
        for index, n in zip(layers, active, strict=True):
            work[index] += n

    def save(self) -> dict[str, Any]:
        """The fields as plain values and tensors."""
        return {f.name: f.metadata["save"](getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def load(cls, saved: Mapping[str, Any], devices: Mapping[str, torch.device]) -> TrainingState:
        """Load a saved state that passed ``check``.

        Args:
            saved: What ``save`` returned, possibly among other keys.
            devices: Layer label to the device of its parameter.
        """
        state = cls(**{f.name: f.metadata["load"](saved.get(f.name, f.metadata["absent"])) for f in fields(cls)})
        state.buffers = {key: buffer.to(devices[key[1]]) for key, buffer in state.buffers.items()}
        return state

    @classmethod
    def check(cls, saved: Mapping[str, Any], labels: Sequence[str]) -> None:
        """Raise ``StateError`` for what ``save`` cannot have returned for layers with these labels."""
        given = {f: saved[f.name] for f in fields(cls) if f.name in saved or f.metadata["absent"] is _REQUIRED}
        if damaged := [f.name for f, value in given.items() if not f.metadata["fits"](value, labels)]:
            raise StateError(f"the state is damaged: {', '.join(damaged)} cannot be such")

    @classmethod
    def required(cls) -> set[str]:
        """The keys that every saved state has."""
        return {f.name for f in fields(cls) if f.metadata["absent"] is _REQUIRED}
