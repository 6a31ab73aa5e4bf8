"""A plain loop resumes exactly from a state saved with ``torch.save`` and read with ``weights_only=True``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import dst
from dst.checkpoints import load_checkpoint, save_atomically
from tests.checks import differences
from tests.methods_list import METHODS, TOTAL_STEPS
from tests.sampling import rotated
from tests.small import OPTIMIZERS, Small, sparsified, state_dicts, train


# The other half of the methods resumes in tests/engine/test_sparsifier.py.
@pytest.mark.parametrize(
    ("name", "optimizer", "first"),
    rotated(METHODS, ("adamw", "odd"), (("model", "optimizer"), ("model",), ("optimizer",), ()), share=(1, 2)),
)
def test_resume_in_a_new_process_order(name: str, optimizer: str, first: tuple[str, ...], tmp_path: Path) -> None:
    """Weights and optimizer before the sparsifier is built, after it, or one of each: all continue exactly."""
    whole = sparsified(name, optimizer)
    train(*whole, 5)
    torch.save(state_dicts(*whole), tmp_path / "5.pt")
    train(*whole, 14)  # past the last update of clocks that stop at three quarters
    saved = torch.load(tmp_path / "5.pt", weights_only=True)
    torch.manual_seed(1)
    model = Small()
    made = OPTIMIZERS[optimizer](model.parameters())
    targets: dict[str, Any] = {"model": model, "optimizer": made}
    for key in first:
        targets[key].load_state_dict(saved[key])
    sparsifier = dst.Sparsifier(model, made, METHODS[name](), total_steps=TOTAL_STEPS)
    for key in set(targets) - set(first):
        targets[key].load_state_dict(saved[key])
    sparsifier.load_state_dict(saved["sparsifier"])
    train(model, made, sparsifier, 14)
    found = list(differences(state_dicts(*whole), state_dicts(model, made, sparsifier)))
    assert not found, (first, found)


def test_loading_the_sparsifier_before_weights_and_optimizer(tmp_path: Path) -> None:
    whole = sparsified("rigl", "adamw")
    train(*whole, 5)
    saved = copy.deepcopy(state_dicts(*whole))
    train(*whole, TOTAL_STEPS - 5)
    model, optimizer, sparsifier = sparsified("rigl", "adamw")
    sparsifier.load_state_dict(saved["sparsifier"])
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, sparsifier, TOTAL_STEPS - 5)
    assert not list(differences(state_dicts(*whole), state_dicts(model, optimizer, sparsifier)))


def test_active_weights_that_are_zero_stay_active() -> None:
    """Connections grown at zero, a moment before the save, are in the mask and not in the weights."""
    model, optimizer, sparsifier = sparsified("rigl")
    train(model, optimizer, sparsifier, 5)  # the last step was an update, and took the place of the step
    saved = copy.deepcopy(state_dicts(model, optimizer, sparsifier))
    grown = sum(int((saved["model"][n].eq(0) & m).sum()) for n, m in saved["sparsifier"]["masks"].items())
    assert grown > 10
    again = sparsified("rigl")
    again[0].load_state_dict(saved["model"])
    again[2].load_state_dict(saved["sparsifier"])
    assert all(torch.equal(m, sparsifier.masks[n]) for n, m in again[2].masks.items())


def test_a_first_mask_does_not_cut_what_a_dense_checkpoint_left_to_the_mask_of_the_state() -> None:
    """Momentum at connections that are inactive in the first mask and active in the saved mask survives construction."""
    whole = sparsified("set", "adamw")
    train(*whole, 9)
    saved = copy.deepcopy(state_dicts(*whole))
    model = Small()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    sparsifier = dst.Sparsifier(model, optimizer, METHODS["set"](), total_steps=TOTAL_STEPS)
    first = sparsifier.masks["hidden.weight"]
    assert (saved["sparsifier"]["masks"]["hidden.weight"] & ~first).any()
    sparsifier.load_state_dict(saved["sparsifier"])
    assert not list(differences(saved, state_dicts(model, optimizer, sparsifier)))


DAMAGE: dict[str, tuple[Any, str]] = {
    "not a state": (lambda s: {}, "not the state of a dst Sparsifier"),
    "format": (lambda s: {**s, "format": 99}, "has format 99"),
    "seed": (lambda s: {**s, "seed": 3}, "seed 3, this run 0"),
    "optimizers": (lambda s: {**s, "steps": [1, 2]}, "2 optimizers, this run 1"),
    "missing": (
        lambda s: {**s, "masks": {k: v for k, v in s["masks"].items() if k != "conv.weight"}},
        r"lacks \['conv\.weight'\]",
    ),
    "shape": (
        lambda s: {**s, "masks": {**s["masks"], "conv.weight": torch.ones(2, 2).bool()}},
        r"conv\.weight as \(2, 2\)",
    ),
    "dtype": (lambda s: {**s, "masks": {k: v.float() for k, v in s["masks"].items()}}, r"torch\.float32"),
    "method": (lambda s: {**s, "method": METHODS["set"]().spec()}, "name: set in the checkpoint, rigl here"),
    "union": (lambda s: {**s, "union": {}}, "union of masks does not fit"),
    "buffer": (lambda s: {**s, "buffers": {"grow/nobody": torch.ones(1)}}, "grow/nobody that does not fit"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(what: str) -> None:
    model, optimizer, sparsifier = sparsified("rigl")
    train(model, optimizer, sparsifier, 6)
    damage, message = DAMAGE[what]
    before = copy.deepcopy(state_dicts(model, optimizer, sparsifier))
    with pytest.raises(dst.StateError, match=message):
        sparsifier.load_state_dict(damage(copy.deepcopy(before["sparsifier"])))
    assert not list(differences(before, state_dicts(model, optimizer, sparsifier)))


def test_a_saved_state_does_not_change_during_training(tmp_path: Path) -> None:
    model, optimizer, sparsifier = sparsified("watching_twice")
    train(model, optimizer, sparsifier, 6)
    held = sparsifier.state_dict()
    copied = copy.deepcopy(held)
    train(model, optimizer, sparsifier, 12)
    assert not list(differences(held, copied))
    save_atomically(held, tmp_path / "state.ckpt")
    assert not list(differences(load_checkpoint(tmp_path / "state.ckpt"), copied))
