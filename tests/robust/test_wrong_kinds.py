"""Arguments that are neither a method nor an optimizer, wrapped optimizers, and settings without effect."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import dst
from tests.methods_list import METHODS, TOTAL_STEPS
from tests.small import Small, sparsified, train


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
    model, optimizer, _ = sparsified("rigl", "adamw")
    plain = sparsified("rigl", "adamw")
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


def test_a_scheduler_is_not_an_optimizer() -> None:
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
