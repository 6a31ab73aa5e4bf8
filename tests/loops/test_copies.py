"""Copies of a training, optimizers rebuilt or wrapped, and things that are neither a method nor an optimizer."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dst
from tests.methods_list import METHODS, TOTAL_STEPS
from tests.resume.fits import differences
from tests.small import Small, train

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


def build(name: str) -> tuple[nn.Module, torch.optim.Optimizer, dst.Sparsifier]:
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    return model, optimizer, dst.Sparsifier(model, optimizer, METHODS[name](), total_steps=TOTAL_STEPS)


def outcome(model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: dst.Sparsifier) -> Any:
    return [model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()]


@pytest.mark.parametrize(
    ("name", "how"),
    [("rigl", "deepcopy"), ("rigl", "pickle"), ("l0", "deepcopy"), ("top_kast", "pickle"), ("gmp", "deepcopy"),
     ("synflow", "deepcopy"), ("grasp", "deepcopy"), ("grown_warmup", "pickle")],
)  # fmt: skip
@pytest.mark.parametrize("last_first", [False, True])
def test_a_copy_trains_as_the_original_does(name: str, how: str, last_first: bool) -> None:
    parts = build(name)
    if name not in ("synflow", "grasp"):  # these are copied while they still watch for the first batch
        train(*parts, 3)
    if last_first:
        sparsifier, optimizer, model = COPIES[how](parts[::-1])
    else:
        model, optimizer, sparsifier = COPIES[how](parts)
    before = copy.deepcopy(outcome(*parts))
    train(model, optimizer, sparsifier, 12)
    assert sparsifier.step == parts[2].step + 12
    assert not list(differences(before, outcome(*parts)))  # the original has not moved
    train(*parts, 12)
    found = list(differences(outcome(*parts), outcome(model, optimizer, sparsifier)))
    assert not found, found


def test_an_optimizer_rebuilt_after_the_sparsifier_is_noticed() -> None:
    model, optimizer, sparsifier = build("rigl")
    other = torch.optim.AdamW(model.parameters(), 0.01)
    with pytest.raises(dst.StateError, match="none of the optimizers that it was built with has stepped"):
        train(model, other, sparsifier, 30, first=0)
    del optimizer


def test_steps_left_out_for_overflows_are_no_mistake() -> None:
    model, optimizer, sparsifier = build("rigl")
    train(model, optimizer, sparsifier, 3)
    for _ in range(60):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float("inf"))
        sparsifier.before_step()
    train(model, optimizer, sparsifier, 3)
    assert sparsifier.step == 6


class AcceleratedOptimizer(torch.optim.Optimizer):
    """As Accelerate's: an optimizer by class, without an optimizer's hook tables."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


def test_a_wrapped_optimizer_is_looked_through() -> None:
    model, optimizer, _ = build("rigl")
    plain = build("rigl")
    torch.manual_seed(0)
    model = Small()
    wrapped = AcceleratedOptimizer(torch.optim.AdamW(model.parameters(), 0.01))
    sparsifier = dst.Sparsifier(model, wrapped, METHODS["rigl"](), total_steps=TOTAL_STEPS)
    for step in range(6):
        train(model, wrapped, sparsifier, 1, first=step)
        sparsifier.before_step(wrapped) if step == 5 else None
    train(*plain, 6)
    assert sparsifier.step == 6
    assert all(torch.equal(m, sparsifier.masks[n]) for n, m in plain[2].masks.items())
    del optimizer


WRONG: dict[str, tuple[Any, Any, str]] = {
    "a name for a method": (None, "rigl", r"'rigl' \(str\) is not a method: pass one such as dst\.methods\.rigl"),
    "no method": (None, None, "None is not a method"),
    "a method that was not called": (None, dst.methods.rigl, r"call it, rigl\(density=0\.1\)"),
    "a name for an optimizer": ("adam", dst.methods.rigl(0.1), r"'adam' \(str\) is not an optimizer"),
    "no optimizer": (..., dst.methods.rigl(0.1), "None is not an optimizer"),
    "a list of none": ([], dst.methods.rigl(0.1), "no optimizer was given"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_method_or_optimizer_is_named(what: str) -> None:
    optimizer, method, message = WRONG[what]
    net = nn.Linear(8, 8)
    made = torch.optim.SGD(net.parameters(), 0.1) if optimizer is None else optimizer
    with pytest.raises(dst.ConfigurationError, match=message):
        dst.Sparsifier(net, None if made is ... else made, method, total_steps=5)
    if optimizer is None:
        with pytest.raises(dst.ConfigurationError, match=message):
            dst.prepare(net, method)
        with pytest.raises(dst.ConfigurationError, match=message):
            dst.plan(net, method)
        with pytest.raises(dst.ConfigurationError, match=message):
            dst.lightning.SparseTraining(method)


def test_a_scheduler_is_no_optimizer() -> None:
    net = nn.Linear(8, 8)
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(net.parameters(), 0.1), 3)
    with pytest.raises(dst.ConfigurationError, match="pass the optimizer that the scheduler has"):
        dst.Sparsifier(net, scheduler, dst.methods.rigl(0.1), total_steps=5)


def test_a_topology_that_is_never_updated_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Linear(8, 8)
    for settings in ({"update_every": 100}, {"start": 0.9, "stop": 0.5}):
        caplog.clear()
        method = dst.methods.rigl(0.2, **settings)
        with caplog.at_level(logging.WARNING):
            dst.Sparsifier(net, torch.optim.SGD(net.parameters(), 0.1), method, total_steps=50).finalize()
        assert "rigl never updates the topology: no update falls within 50 steps" in caplog.text


def test_csr_that_serves_no_layer_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Conv1d(4, 8, 3))
    method = dst.methods.rigl(0.2, update_every=2, backend="csr")
    with caplog.at_level(logging.WARNING):
        model = dst.prepare(net, method)
        dst.Sparsifier(model, torch.optim.SGD(model.parameters(), 0.1), method, total_steps=50)
    assert 'backend="csr" stores no layer of this model as non-zeros alone' in caplog.text
    assert "Conv1d has no csr kernel" in caplog.text
