"""Per-weight optimizer state is found by shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dst.topology.optimizer_state import clear_state, mask_state, per_weight_state
from tests.small import OPTIMIZERS, Odd


def stepped(make, shape=(6, 4)):
    parameter = nn.Parameter(torch.randn(shape))
    optimizer = make([parameter])
    for _ in range(2):
        parameter.grad = torch.ones(shape)
        optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("sgd", {"momentum_buffer"}),
        ("adamw", {"exp_avg", "exp_avg_sq"}),
        ("nadam", {"exp_avg", "exp_avg_sq"}),
        ("rmsprop", {"square_avg", "momentum_buffer", "grad_avg"}),
        ("adagrad", {"sum"}),
        ("odd", {"trace", "seen", "touched"}),
    ],
)
def test_state_of_the_parameters_shape_is_found(name, keys):
    parameter, optimizer = stepped(OPTIMIZERS[name])
    assert {key for key, _ in per_weight_state(optimizer, parameter)} == keys


def test_a_scalar_parameter_has_no_per_weight_state():
    parameter, optimizer = stepped(OPTIMIZERS["adamw"], ())
    assert list(per_weight_state(optimizer, parameter)) == []


def test_looking_creates_no_state():
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = OPTIMIZERS["sgd"]([parameter])
    assert list(per_weight_state(optimizer, parameter)) == []
    assert len(optimizer.state) == 0


def snapshot(optimizer, parameter):
    return {k: v.clone() if torch.is_tensor(v) else v for k, v in optimizer.state[parameter].items()}


def test_clearing_touches_the_positions_and_nothing_else():
    parameter, optimizer = stepped(Odd)
    before = snapshot(optimizer, parameter)
    clear_state(optimizer, parameter, torch.tensor([9, 12]))
    state = optimizer.state[parameter]
    for key in ("trace", "seen"):
        changed = (state[key] != before[key]).nonzero().tolist()
        assert changed == [[2, 1], [3, 0]]
        assert state[key][2, 1] == state[key][3, 0] == 0
    for key in ("scalar", "rows", "flat"):
        assert torch.equal(state[key], before[key])
    assert (state["log"], state["number"], state["nothing"]) == ([1, 2], 3, None)


def test_flags_are_cleared_too():
    parameter, optimizer = stepped(Odd)
    optimizer.state[parameter]["touched"].fill_(True)
    clear_state(optimizer, parameter, torch.tensor([0, 23]))
    assert (~optimizer.state[parameter]["touched"]).nonzero().tolist() == [[0, 0], [5, 3]]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masking_clears_exactly_what_is_inactive(name):
    parameter, optimizer = stepped(OPTIMIZERS[name])
    before = snapshot(optimizer, parameter)
    mask = torch.rand(6, 4) < 0.5
    mask_state(optimizer, parameter, mask)
    seen = 0
    for key, value in per_weight_state(optimizer, parameter):
        assert not value[~mask].any()
        assert torch.equal(value[mask], before[key][mask])
        seen += 1
    assert seen
