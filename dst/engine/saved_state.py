"""Whether a saved sparsifier state is whole, and belongs to the run that is to go on from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dst.backends.saved import count, is_mask, is_union
from dst.backends.storages import Storages
from dst.engine.warmup import check_young
from dst.errors import StateError
from dst.method import Method, check_same
from dst.pieces.protocols import LossInit
from dst.topology.layers import SparseLayer

logger = logging.getLogger("dst.engine.sparsifier")

STATE_FORMAT = 1
STEP_KINDS = ("dense", "sparse", "dense_gradient")
KEYS = {
    "format",
    "method",
    "seed",
    "total_steps",
    "steps",
    "updated_at",
    "sparsified",
    "updates",
    "skipped",
    "step_counts",
    "last_update",
    "set_density",
    "budget_density",
    "budgets",
    "amount",
    "work",
    "warming",
    "layers",
    "masks",
    "union",
    "buffers",
    "collected",
    "latent",
}


@dataclass(frozen=True)
class Expected:
    """What a run has, for a state to be compared with.

    Attributes:
        method: Its method.
        seed: Its seed.
        total_steps: Its length, for each optimizer with sparse parameters.
        layers: Its sparse layers.
        storages: Its storages.
    """

    method: Method
    seed: int
    total_steps: Sequence[int]

    @property
    def optimizers(self) -> int:
        """Number of optimizers with sparse parameters."""
        return len(self.total_steps)

    layers: Sequence[SparseLayer]
    storages: Storages


def check_state(state: Mapping[str, Any], here: Expected) -> None:
    """Compare a saved state with what a run can go on from, all of it before anything is changed.

    Raises:
        StateError: A state of another method, density, model or format, or a damaged one; the message says what differs.
    """
    if not isinstance(state, Mapping) or not state.keys() >= KEYS:
        raise StateError("this is not the state of a dst Sparsifier, or it is damaged")
    if state["format"] != STATE_FORMAT:
        raise StateError(f"the state has format {state['format']}; this version of dst reads {STATE_FORMAT}")
    for key in (
        "method",
        "masks",
        "union",
        "buffers",
        "step_counts",
        "collected",
        "budgets",
        "work",
        "warming",
        "latent",
    ):
        if not isinstance(state[key], Mapping):
            raise StateError(f"the state is damaged: {key} is no mapping")
    try:
        _check_contents(state, here)
    except StateError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise StateError(f"the state is damaged: {type(error).__name__}: {error}") from error


def _check_contents(state: Mapping[str, Any], here: Expected) -> None:
    check_same(state["method"], here.method)  # every backend reads what another has saved
    if state["seed"] != here.seed:
        raise StateError(f"the checkpoint has seed {state['seed']}, this run {here.seed}: use the same")
    if not _are_counts(state["steps"]) or not _are_counts([state["updates"], state["skipped"]]):
        raise StateError("the state is damaged: steps and updates must be counts")
    if state["step_counts"].keys() != set(STEP_KINDS) or not _are_counts(list(state["step_counts"].values())):
        raise StateError("the state is damaged: step_counts must be counts of dense, sparse and dense_gradient steps")
    if len(state["steps"]) != here.optimizers:
        raise StateError(f"the checkpoint has {len(state['steps'])} optimizers, this run {here.optimizers}")
    if len(state.get("budget_densities", state["steps"])) != len(state["steps"]):
        raise StateError("the state is damaged: budget_densities and steps do not belong together")
    _check_numbers(state)
    check_masks(state["masks"], "the checkpoint", here.storages)
    if unknown := sorted(set(state["collected"]) - set(here.storages.parameters)):
        raise StateError(f"the checkpoint has collected gradients of {', '.join(unknown)}, which the model has not")
    _check_table(state, here)
    _check_buffers(state, here)
    _check_latent(state, here)
    check_young(state["warming"], {layer.label: layer for layer in here.layers})
    saved = state["total_steps"]
    if (saved if isinstance(saved, list) else [saved] * here.optimizers) != list(here.total_steps):
        logger.warning(
            "the checkpoint's schedules were laid out for %s steps and go on for %s",
            saved,
            ", ".join(map(str, here.total_steps)),
        )


def _check_numbers(state: Mapping[str, Any]) -> None:
    """Values that are read without another look."""
    last, totals = state["last_update"], state["total_steps"]
    wrong = {
        "sparsified": not isinstance(state["sparsified"], bool),
        "amount": not _is_number(state["amount"]),
        "last_update": last is not None
        and not (isinstance(last, (list, tuple)) and len(last) == 3 and all(map(_is_number, last))),
        "total_steps": not _are_counts(totals if isinstance(totals, list) else [totals])
        or (isinstance(totals, list) and len(totals) != len(state["steps"])),
        "updated_at": not isinstance(state["updated_at"], list)
        or not all(isinstance(s, int) for s in state["updated_at"]),
        "layers": not isinstance(state["layers"], list) or not all(isinstance(row, Mapping) for row in state["layers"]),
        "budget_densities": not _are_densities(state.get("budget_densities", []), optional=True),
        "splits": not _are_splits(state.get("splits", [])),
        "settings": not _are_counts([state.get("settings", 0)]),
    }
    pairs = [pair for held in state["collected"].values() for pair in held]
    if not all(isinstance(pair, (list, tuple)) and all(isinstance(t, Tensor) for t in pair) for pair in pairs):
        wrong["collected"] = True
    if damaged := [key for key, is_wrong in wrong.items() if is_wrong]:
        raise StateError(f"the state is damaged: {', '.join(damaged)} cannot be such")


def _are_densities(values: Any, *, optional: bool) -> bool:
    return isinstance(values, list) and all((optional and v is None) or (_is_number(v) and 0 < v <= 1) for v in values)


def _are_splits(splits: Any) -> bool:
    """Lists of a density, the budgets of all layers, and numbers of optimizers."""
    return isinstance(splits, list) and all(
        isinstance(split, (list, tuple))
        and len(split) == 3
        and _are_densities([split[0]], optional=False)
        and _are_counts(split[1])
        and _are_counts(split[2])
        for split in splits
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_table(state: Mapping[str, Any], here: Expected) -> None:
    """Compare the state's layers with this run's, and with the counts of its own masks."""
    saved = {row.get("name"): row.get("nonzero") for row in state["layers"]}
    masks = state["masks"]
    found = {
        x.label: count(masks[x.parameter] if masks[x.parameter].ndim == 1 else x.part(masks[x.parameter]))
        for x in here.layers
    }
    if saved.keys() != found.keys():
        different = sorted(map(str, saved.keys() ^ found.keys()))
        raise StateError(f"the checkpoint has other sparse layers: {', '.join(different)} differ")
    if off := [name for name in found if saved[name] != found[name]]:
        raise StateError(f"the state is damaged: masks of {', '.join(off)} are off their budget")


def _check_buffers(state: Mapping[str, Any], here: Expected) -> None:
    """What belongs to the masks: their union, once there are any that move, and the scores' buffers."""
    if state["union"] or (state["sparsified"] and here.method.is_dynamic and here.method.density < 1):
        check_masks(state["union"], "the checkpoint's union of masks", here.storages, is_union)
    roles = [*here.method.scores(), *(["init"] if isinstance(here.method.init, LossInit) else [])]
    shapes = {f"{role}/{layer.label}": layer.shape for role in roles for layer in here.layers}
    for key, buffer in state["buffers"].items():
        if key not in shapes or not isinstance(buffer, Tensor) or tuple(buffer.shape) != shapes[key]:
            raise StateError(f"the checkpoint has a score buffer {key} that does not fit the model")
    if state["budgets"].keys() != {layer.label for layer in here.layers} or not _are_counts(
        list(state["budgets"].values())
    ):
        raise StateError("the state is damaged: budgets must be counts, one for every sparse layer")
    work = list(state["work"].values())
    if not state["work"].keys() <= set(STEP_KINDS) or any(
        not _are_counts(w) or len(w) != len(here.layers) for w in work
    ):
        raise StateError("the state is damaged: work must hold a count for every sparse layer")
    for density in (state["set_density"], state["budget_density"]):
        if density is not None and not (isinstance(density, float) and 0 < density <= 1):
            raise StateError("the state is damaged: densities must lie in (0, 1]")
    if not isinstance(state["updated_at"], list) or len(state["updated_at"]) != len(state["steps"]):
        raise StateError("the state is damaged: steps and updated_at do not belong together")


def _check_latent(state: Mapping[str, Any], here: Expected) -> None:
    """What storages keep beside the parameters has names and shapes that follow from the model and the method."""
    masked = bool(state["sparsified"])
    shapes = here.storages.latent_shapes(masked)
    saved = {n: tuple(t.shape) if isinstance(t, Tensor) else None for n, t in state["latent"].items()}
    if off := sorted(n for n in shapes.keys() | saved.keys() if shapes.get(n, ...) != saved.get(n, ...)):
        raise StateError(f"the checkpoint's latent weights do not fit the model: {', '.join(off)}")


def check_masks(
    masks: Mapping[str, Tensor],
    source: str,
    storages: Storages,
    fits: Callable[[Tensor, tuple[int, ...]], bool] = is_mask,
) -> None:
    """Compare saved masks (or unions of such) with a model's sparse parameters.

    Args:
        masks: Name to saved mask.
        source: Where they come from, for messages.
        storages: The model's storages.
        fits: Says whether one has the form and shape.

    Raises:
        StateError: Masks that are missing, too many, or of other shapes.
    """
    names = storages.parameters.keys()
    if masks.keys() != names:
        missing, extra = sorted(names - masks.keys()), sorted(masks.keys() - names)
        raise StateError(
            f"{source} does not fit the model: "
            + "; ".join(t for t in (missing and f"lacks {missing}", extra and f"has unknown {extra}") if t)
        )
    for name, parameter in storages.parameters.items():
        mask, shape, held = masks[name], storages.shape(name), parameter.numel()
        if not isinstance(mask, Tensor) or not fits(mask, shape):
            found = f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise StateError(f"{source} has {name} as {found}, the model as {shape}")
        if fits is is_mask and storages.is_prepared(name) and count(mask) != held:
            raise StateError(
                f"{source} has {count(mask)} connections in {name}, the model was prepared with {held}: "
                "prepare it with the method of the checkpoint"
            )


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)
