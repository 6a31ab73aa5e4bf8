"""Copies of model, optimizer and sparsifier train as the originals do; a copy without its optimizer raises an error."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dst
from dst import Sparsifier
from tests.checks import differences, hooks_of
from tests.methods_list import METHODS, TOTAL_STEPS
from tests.sampling import rotated
from tests.small import OPTIMIZERS, Small, Trio, backward, batch, sparsified, state_dicts, train


def by_torch(held: Any) -> Any:
    file = io.BytesIO()
    torch.save(held, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


HOW: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda held: pickle.loads(pickle.dumps(held)),
    "torch.save": by_torch,
}


def on_non_zeros() -> Trio:
    """A trio whose linear layers store only their active weights."""
    torch.manual_seed(0)
    method = dst.methods.rigl(0.3, update_every=4, backend="csr")
    return sparsified(method, model=dst.prepare(Small(), method))


def copied(trio: Trio, how: str, order: tuple[int, ...]) -> Trio:
    held = HOW[how](tuple(trio[i] for i in order))
    model, optimizer, sparsifier = (held[order.index(i)] for i in range(3))
    return model, optimizer, sparsifier


# Each method once; how, order, moment and optimizer vary with them.
CASES = [
    ("rigl", "deepcopy", (0, 1, 2), 0, "sgd"),
    ("set", "pickle", (2, 1, 0), 5, "adamw"),
    ("momentum_growth", "torch.save", (1, 2, 0), 6, "odd"),
    ("static_at_step", "deepcopy", (2, 0, 1), 3, "sgd"),
    ("grown_warmup", "pickle", (0, 2, 1), 9, "adamw"),
    ("granet", "deepcopy", (1, 0, 2), 7, "sgd"),
    ("snip", "pickle", (0, 1, 2), 0, "sgd"),
    ("grasp", "deepcopy", (0, 1, 2), 0, "sgd"),
    ("grasp", "pickle", (2, 1, 0), 0, "sgd"),
    ("synflow", "deepcopy", (2, 1, 0), 0, "adamw"),
    ("synflow", "torch.save", (0, 1, 2), 0, "sgd"),
    ("l0", "deepcopy", (0, 1, 2), 4, "adamw"),
    ("l0", "pickle", (2, 0, 1), 4, "sgd"),
    ("top_kast", "deepcopy", (2, 1, 0), 5, "sgd"),
    ("movement", "torch.save", (0, 1, 2), 2, "adamw"),
]


@pytest.mark.parametrize(("name", "how", "order", "after", "optimizer"), CASES)
def test_a_copy_trains_on_as_the_original(
    name: str, how: str, order: tuple[int, ...], after: int, optimizer: str
) -> None:
    whole = sparsified(name, optimizer)
    train(*whole, after)
    other = copied(whole, how, order)
    before = copy.deepcopy(state_dicts(*whole))
    assert hooks_of(other[0]) == hooks_of(whole[0])
    train(*other, 8)
    assert other[2].step == after + 8
    assert not list(differences(before, state_dicts(*whole)))  # the original stands still
    train(*whole, 8)
    assert not list(differences(state_dicts(*whole), state_dicts(*other)))
    assert other[2].is_sparse == whole[2].is_sparse
    for mask_name, mask in other[2].masks.items() if name != "l0" else ():
        assert other[0].get_parameter(mask_name)[~mask].eq(0).all()


@pytest.mark.parametrize(
    ("after", "how", "order"), rotated([0, 3, 4], ["deepcopy", "pickle"], [(0, 1, 2), (2, 1, 0)], each=2)
)
def test_copies_of_sparse_storage(after: int, how: str, order: tuple[int, ...]) -> None:
    """Growth by gradient works if the copy is taken one step before an update."""
    whole = on_non_zeros()
    assert "csr" in whole[2].backends.values()
    train(*whole, after)
    other = copied(whole, how, order)
    train(*other, 6)
    train(*whole, 6)
    assert other[2].updates == whole[2].updates > 1
    assert not list(differences(state_dicts(*whole), state_dicts(*other)))


def test_a_copy_in_the_middle_of_an_accumulated_step_keeps_what_is_collected() -> None:
    whole = on_non_zeros()
    train(*whole, 4)
    backward(whole[0], whole[1], 4)
    other = copied(whole, "deepcopy", (0, 1, 2))
    for p, q in zip(whole[0].parameters(), other[0].parameters(), strict=True):
        q.grad = p.grad.clone()  # type: ignore[union-attr]  # copies of parameters have no gradient
    for model, optimizer, sparsifier in (whole, other):
        torch.nn.functional.cross_entropy(model(batch(5)[0]), batch(5)[1]).backward()
        sparsifier.before_step()
        optimizer.step()
    assert not list(differences(state_dicts(*whole), state_dicts(*other)))


@pytest.mark.parametrize("how", HOW)
def test_a_copy_taken_before_training_loads_a_state_as_the_original_does(how: str) -> None:
    """Weights that were loaded before construction, and cut by its first mask, come back in the copy too."""
    whole = sparsified("rigl", "adamw")
    train(*whole, 9)
    saved = copy.deepcopy(state_dicts(*whole))
    torch.manual_seed(1)
    model = Small()
    model.load_state_dict(saved["model"])
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    other = copied((model, optimizer, Sparsifier(model, optimizer, METHODS["rigl"](), total_steps=24)), how, (0, 1, 2))
    other[2].load_state_dict(saved["sparsifier"])
    assert not list(differences(saved, state_dicts(*other)))


def test_a_copy_of_what_is_finalized_takes_part_in_nothing() -> None:
    whole = sparsified("synflow")
    whole[2].finalize()
    model, optimizer, _ = copied(whole, "deepcopy", (0, 1, 2))
    backward(model, optimizer, 0)
    optimizer.step()
    assert hooks_of(model) == 0


def test_several_optimizers_are_copied_with_their_sparsifier() -> None:
    model = nn.ModuleDict({"a": nn.Linear(20, 20), "b": nn.Linear(20, 20)})
    optimizers = [torch.optim.SGD(model[name].parameters(), 0.1) for name in "ab"]
    sparsifier = Sparsifier(model, optimizers, dst.methods.set_(0.2, update_every=2), total_steps=20)
    model, optimizers, sparsifier = copy.deepcopy((model, optimizers, sparsifier))
    for step in range(6):
        for name, optimizer in zip("ab", optimizers, strict=True):
            optimizer.zero_grad()
            model[name](torch.ones(2, 20)).sum().backward()
            sparsifier.before_step(optimizer)
            optimizer.step()
            assert sparsifier.active == 160, step
    assert sparsifier.state_dict()["steps"] == [6, 6]
    assert sparsifier.updates > 2


# -- optimizers that nobody told of --------------------------------------------------------------------------------


def test_a_replaced_optimizer_is_reported() -> None:
    model, _, sparsifier = sparsified("rigl")
    anew = OPTIMIZERS["sgd"](model.parameters())

    def steps() -> None:
        for step in range(6):
            backward(model, anew, step)
            sparsifier.before_step()
            anew.step()

    with pytest.raises(dst.StateError, match="never steps: this sparsifier belongs to another optimizer: build"):
        steps()


def test_so_is_one_that_is_built_anew_in_the_middle() -> None:
    model, optimizer, sparsifier = trio = sparsified("set")
    train(*trio, 5)
    backward(model, optimizer, 5)
    anew = OPTIMIZERS["adamw"](model.parameters())
    with pytest.raises(dst.StateError, match=r"given a AdamW that holds \w+"):
        sparsifier.before_step(anew)
    # The remedy that the message names works.
    state = sparsifier.state_dict()
    sparsifier.finalize(ended=False)
    new = Sparsifier(model, anew, METHODS["set"](), total_steps=TOTAL_STEPS)
    new.load_state_dict(state)
    train(model, anew, new, 5)
    assert new.step == 10


@pytest.mark.parametrize("poison", [None, float("inf")])
def test_steps_that_are_left_out_are_no_other_optimizers(poison: float | None) -> None:
    """By a gradient scaler, a limit on the norm, or while gradients accumulate: the weights stand still."""
    model, optimizer, sparsifier = sparsified("rigl")
    for step in range(30):
        backward(model, optimizer, step)
        if poison is not None:
            next(model.parameters()).grad.fill_(poison)  # type: ignore[union-attr]
        sparsifier.before_step()
    train(model, optimizer, sparsifier, 3)
    assert sparsifier.step == 3


def test_an_optimizer_that_takes_two_gradients_a_step_is_served() -> None:
    """Sharpness-aware minimization moves the weights between two calls, and the optimizer steps after the second."""
    model, optimizer, sparsifier = sparsified("set")
    for step in range(8):
        backward(model, optimizer, step)
        sparsifier.before_step()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.grad, alpha=0.01)  # type: ignore[arg-type]
        backward(model, optimizer, step)
        sparsifier.before_step()
        optimizer.step()
    assert sparsifier.step == 8


def test_steps_after_finalize_are_ignored() -> None:
    model, optimizer, sparsifier = sparsified("rigl")
    sparsifier.finalize()
    for step in range(6):
        backward(model, optimizer, step)
        sparsifier.before_step()
        optimizer.step()


def test_an_optimizer_of_other_parameters_is_passed_over() -> None:
    _, _, sparsifier = sparsified("rigl")
    sparsifier.before_step(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1))
