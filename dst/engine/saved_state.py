"""Saves and loads a training. A state is checked as a whole before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dst.backends.saved import count, is_mask, is_union
from dst.backends.storages import Storages
from dst.engine.state import TrainingState
from dst.engine.steps import STEP_KEYS, check_steps, load_steps, state_of_steps
from dst.engine.training import Training
from dst.engine.warmup import check_young
from dst.errors import StateError
from dst.method import check_same
from dst.pieces.protocols import LossInit
from dst.topology.mask_file import check_masks

STATE_FORMAT = 1
_MAPPINGS = (
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
)
KEYS = {"format", "seed", "layers", *_MAPPINGS} | STEP_KEYS | TrainingState.required()


def save_training(training: Training, table: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything needed to resume, as plain values and tensors.

    Args:
        training: The training.
        table: ``Sparsifier.layer_table()``.
    """
    return {
        "format": STATE_FORMAT,
        "method": training.method.spec(),
        "seed": training.seed,
        **state_of_steps(training.steppers),
        **training.state.save(),
        "warming": {} if training.warming is None else training.warming.state(),
        "layers": list(table),
        **training.storages.state(),
        "collected": training.storages.collected_state(),
    }


def load_training(training: Training, state: Mapping[str, Any]) -> None:
    """Continue from a state that passed ``check_state``."""
    devices = {layer.label: training.storages.parameter(layer).device for layer in training.layers}
    training.state = TrainingState.load(state, devices)
    training.storages.load(state, int(state["steps"][0]))
    training.check_agreement(int(state["steps"][0]))
    load_steps(training.steppers, state)
    if training.warming is not None:
        layers = {layer.label: layer for layer in training.layers}
        training.warming.load(state["warming"], layers, training.storages.parameters)
    training.expect_gradients()
    training.storages.load_collected(state["collected"])


def check_state(state: Mapping[str, Any], here: Training) -> None:
    """Check that a saved state is complete and belongs to this training; change nothing.

    Raises:
        StateError: The state is damaged, or of another method, density, model or format; the message says what differs.
    """
    if not isinstance(state, Mapping) or not state.keys() >= KEYS:
        raise StateError("this is not the state of a dst Sparsifier, or it is damaged")
    if state["format"] != STATE_FORMAT:
        raise StateError(f"the state has format {state['format']}; this version of dst reads {STATE_FORMAT}")
    for key in _MAPPINGS:
        if not isinstance(state[key], Mapping):
            raise StateError(f"the state is damaged: {key} is no mapping")
    try:
        _check_contents(state, here)
    except StateError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise StateError(f"the state is damaged: {type(error).__name__}: {error}") from error


def _check_contents(state: Mapping[str, Any], here: Training) -> None:
    check_same(state["method"], here.method)  # every backend reads what another has saved
    if state["seed"] != here.seed:
        raise StateError(f"the checkpoint has seed {state['seed']}, this run {here.seed}: use the same")
    shapes = {name: here.storages.shape(name) for name in here.storages.parameters}
    check_masks(state["masks"], shapes, "the checkpoint", is_mask)
    check_prepared(state["masks"], "the checkpoint", here.storages)
    if state["union"] or (state["sparsified"] and here.method.is_dynamic and here.method.density < 1):
        check_masks(state["union"], shapes, "the checkpoint's union of masks", is_union)
    _check_collected(state["collected"], here)
    _check_table(state, here)
    TrainingState.check(state, [layer.label for layer in here.layers])
    _check_buffers(state["buffers"], here)
    _check_latent(state, here)
    check_young(state["warming"], {layer.label: layer for layer in here.layers})
    check_steps(state, here.steppers)


def _check_collected(collected: Mapping[str, Any], here: Training) -> None:
    """Compare the gradients of an accumulated step with the model's parameters."""
    if unknown := sorted(collected.keys() - here.storages.parameters.keys()):
        raise StateError(f"the checkpoint has collected gradients of {', '.join(unknown)}, which the model has not")
    pairs = [pair for held in collected.values() for pair in held]
    if not all(isinstance(pair, (list, tuple)) and all(isinstance(t, Tensor) for t in pair) for pair in pairs):
        raise StateError("the state is damaged: collected cannot be such")


def _check_table(state: Mapping[str, Any], here: Training) -> None:
    """Compare the state's layers with this run's, and with the counts of its own masks."""
    if not isinstance(state["layers"], list) or not all(isinstance(row, Mapping) for row in state["layers"]):
        raise StateError("the state is damaged: layers cannot be such")
    saved = {row.get("name"): row.get("nonzero") for row in state["layers"]}
    masks = state["masks"]
    found = {x.label: count(masks[x.parameter], x) for x in here.layers}
    if saved.keys() != found.keys():
        different = sorted(map(str, saved.keys() ^ found.keys()))
        raise StateError(f"the checkpoint has other sparse layers: {', '.join(different)} differ")
    if off := [name for name in found if saved[name] != found[name]]:
        raise StateError(f"the state is damaged: masks of {', '.join(off)} are off their budget")


def _check_buffers(buffers: Mapping[str, Tensor], here: Training) -> None:
    """Compare the scores' buffers with the layers, for the scores that the method has."""
    roles = [*here.method.scores(), *(["init"] if isinstance(here.method.init, LossInit) else [])]
    shapes = {f"{role}/{layer.label}": layer.shape for role in roles for layer in here.layers}
    for key, buffer in buffers.items():
        if key not in shapes or tuple(buffer.shape) != shapes[key]:
            raise StateError(f"the checkpoint has a score buffer {key} that does not fit the model")


def _check_latent(state: Mapping[str, Any], here: Training) -> None:
    """Compare saved latent weights with the model's names and shapes."""
    shapes = here.storages.latent_shapes(state["sparsified"])
    saved = {n: tuple(t.shape) if isinstance(t, Tensor) else None for n, t in state["latent"].items()}
    if off := sorted(n for n in shapes.keys() | saved.keys() if shapes.get(n, ...) != saved.get(n, ...)):
        raise StateError(f"the checkpoint's latent weights do not fit the model: {', '.join(off)}")


def check_prepared(masks: Mapping[str, Tensor], source: str, storages: Storages) -> None:
    """Raise ``StateError`` for masks with other counts than the prepared layers have.

    Args:
        masks: Name to saved mask: a bool tensor, or positions.
        source: Where they come from, for messages.
        storages: The model's storages.
    """
    for name, mask in masks.items():
        held = storages.parameters[name].numel()
        if storages.is_prepared(name) and count(mask) != held:
            raise StateError(
                f"{source} has {count(mask)} connections in {name}, the model was prepared with {held}: "
                "prepare it with the method of the checkpoint"
            )
