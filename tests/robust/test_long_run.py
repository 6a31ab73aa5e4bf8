"""Hundreds and thousands of updates: counts stay exact, and memory does not grow."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import dst
from dst.schedules import Constant


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("updates", [300, pytest.param(10_000, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("make", [dst.methods.rigl, dst.methods.set_])
def test_many_updates(make, updates):
    torch.manual_seed(0)
    model = nn.Linear(16, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    method = make(0.25, update_every=1, fraction=Constant(0.3), stop=1.0, replace_step=False)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=updates)
    generator = torch.Generator().manual_seed(0)
    alive, size = 0, 0
    for step in range(updates):
        optimizer.zero_grad()
        model.weight.grad = torch.randn(12, 16, generator=generator)
        model.bias.grad = torch.zeros(12)
        sparsifier.before_step()
        optimizer.step()
        if step % 150 == 75:
            assert int(sparsifier.masks["weight"].sum()) == sparsifier.active == 48
            assert model.weight[~sparsifier.masks["weight"]].eq(0).all()
        if step == updates // 2:
            alive, size = tensors_alive(), len(repr(sparsifier.state_dict()))
    assert sparsifier.updates == updates
    assert tensors_alive() <= alive
    assert len(repr(sparsifier.state_dict())) <= size + 100
    assert sparsifier.exploration_rate == 1.0
