"""GraNet (Liu et al. 2021, https://arxiv.org/abs/2106.10404, Algorithm 1) against a loop, and densities that move."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import dst
from dst import methods
from dst.allocation import ERK
from dst.amounts import BelowThreshold
from dst.errors import ConfigurationError
from dst.schedules import Constant, Cubic, Stepwise
from tests.parity.pruning import UPDATES, global_loop, kept, sparsity
from tests.small import random_gradients


@pytest.mark.parametrize(
    ("step", "density"), [(0, 1.0), (10, 1.0), (20, 0.2125), (25, 0.1140625), (30, 0.1), (40, 0.1), (99, 0.1)]
)
def test_the_cubic_schedule_by_hand(step, density):
    """From 1 to 0.1 within [10, 30]: at 20 half is over, and density is 0.1 + 0.9 / 8."""
    schedule = Cubic(1.0, 10, 30)
    assert schedule(step, 100, 0.1) == pytest.approx(density)
    assert 1 - schedule(step, 100, 0.1) == pytest.approx(float(sparsity(step, 0.0, 0.9, 10, 30)))


@pytest.mark.parametrize("initial", [1.0, 0.5])
def test_granet_agrees_with_a_loop(initial):
    sparsifier, trace = global_loop(initial, UPDATES, regrow=True)
    assert sparsifier.updates == len(UPDATES)
    assert trace[0] == kept(sum(layer.weights for layer in sparsifier.layers), 1 - initial)


def test_a_sparse_start_is_laid_out_by_erk():
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = dst.Sparsifier(model, optimizer, methods.granet(0.1, initial_density=0.5), total_steps=10)
    found = [row["nonzero"] for row in sparsifier.layer_table()]
    assert found == ERK().counts(["0", "1"], [(40, 50), (10, 40)], 0.5)


def test_a_density_may_rise_and_fall():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 5))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    schedule = Stepwise(((4, 0.2), (8, 0.5)), initial=0.3, stop=14)
    sparsifier = dst.Sparsifier(
        model, optimizer, methods.granet(0.1, schedule=schedule, update_every=2), total_steps=20
    )
    trace = []
    for step in range(20):
        random_gradients(model, step)
        sparsifier.before_step()
        optimizer.step()
        trace.append(sparsifier.active)
    assert trace == [150] * 4 + [100] * 4 + [250] * 6 + [50] * 6


@pytest.mark.parametrize("amount", [None, BelowThreshold(10.0, 0.5)])
def test_between_the_clocks_end_and_the_schedules_nothing_is_replaced(amount):
    """The update that settles the budget drops what is due and no more."""
    model = nn.Linear(20, 20)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    method = methods.granet(
        0.1, schedule=Stepwise((), initial=0.5, stop=10), update_every=2, stop=5, fraction=Constant(0.5)
    )
    method = replace(method, amount=amount)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=12)
    for step in range(12):
        random_gradients(model, step)
        before = sparsifier.masks["weight"]
        sparsifier.before_step()
        after = sparsifier.masks["weight"]
        if step == 10:
            assert int(after.sum()) == 40
            assert not (after & ~before).any()
        elif step > 4:
            assert torch.equal(before, after)
        optimizer.step()
    assert sparsifier.updates == 4


def test_csr_is_refused():
    for make in (methods.gmp, methods.granet):
        with pytest.raises(ConfigurationError, match="changes the number of a layer's connections"):
            make(0.1, backend="csr")


def test_a_schedule_that_passes_through_too_low_a_density_is_refused_at_once():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = methods.granet(0.5, schedule=Stepwise(((4, 0.001),)))
    with pytest.raises(ConfigurationError, match=r"density=0\.001 keeps 1 weights for 2 layers"):
        dst.Sparsifier(model, optimizer, method, total_steps=20)


def test_the_last_step_arrives_at_the_density():
    model = nn.Linear(20, 20)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    method = methods.granet(0.1, schedule=Stepwise((), initial=0.5, stop=1.0), update_every=2, stop=1.0)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=12)
    for step in range(12):
        random_gradients(model, step)
        sparsifier.before_step()
        optimizer.step()
        assert sparsifier.active == (200 if step < 11 else 40)
