"""Gradual magnitude pruning (Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878) against loops of its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import dst
from dst import methods
from dst.allocation import ERK
from tests.parity.pruning import STEPS, STOP, UPDATES, global_loop, kept, sparsity
from tests.small import Small, random_gradients


@pytest.mark.parametrize("initial", [1.0, 0.5])
def test_global_gmp_agrees_with_a_loop(initial):
    sparsifier, _ = global_loop(initial, UPDATES, regrow=False)
    assert sparsifier.churn == 0
    assert sparsifier.step_counts["dense_gradient"] == 0


@pytest.mark.parametrize("initial", [1.0, 0.6])
def test_gmp_prunes_the_smallest_of_every_layer(initial):
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = methods.gmp(0.2, update_every=4, start=2, stop=STOP, initial_density=initial)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=STEPS)
    for step in range(STEPS):
        random_gradients(model, step)
        before = sparsifier.masks
        weights = {n: model.get_parameter(n).detach().clone() for n in before}
        sparsifier.before_step()
        for layer in sparsifier.layers:
            old, new = (layer.part(masks[layer.parameter]) for masks in (before, sparsifier.masks))
            if step in (2, 6, 10, 14, 15):
                count = kept(layer.weights, sparsity(step, round(1 - initial, 1), 0.8, 2))
                magnitude = layer.part(weights[layer.parameter]).abs().masked_fill(~old, -1).flatten()
                best = magnitude.argsort(descending=True)[:count]
                assert sorted(best.tolist()) == new.flatten().nonzero().squeeze(1).tolist()
            else:
                assert torch.equal(old, new)
        optimizer.step()


def test_layers_never_grow_for_the_sake_of_rounding():
    """ERK's rounded counts may rise by one while the density falls; without growth the budget must hold all the same."""
    model = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 5), nn.Linear(5, 11), nn.Linear(11, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = methods.gmp(0.3, update_every=1, stop=1.0, initial_density=0.7, allocation=ERK())
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=300)
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim == 2]
    total, ideal, rose = sum(a * b for a, b in shapes), None, False
    for step in range(300):
        random_gradients(model, step)
        sparsifier.before_step()
        optimizer.step()
        density = method.density_at(step, 300)
        budget = ERK().counts(["a", "b", "c", "d"], shapes, density)
        rose = rose or (ideal is not None and any(now > was for was, now in zip(ideal, budget, strict=True)))
        ideal = budget
        assert sparsifier.active == sum(budget)
        assert all(abs(r["nonzero"] - b) <= 1 for r, b in zip(sparsifier.layer_table(), budget, strict=True))
    assert rose
    assert sparsifier.active == kept(total, 0.7)


def test_an_update_left_out_where_the_budget_settles_is_made_up_for():
    model = nn.Linear(20, 20)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = dst.Sparsifier(model, optimizer, methods.gmp(0.1, update_every=4, stop=8), total_steps=12)
    for step in range(12):
        random_gradients(model, step)
        if step == 8:
            model.bias.grad[0] = math.nan
        sparsifier.before_step()
        assert (sparsifier.active == 40) == (step > 8)
        if step == 8:
            model.bias.grad.zero_()
        optimizer.step()
    assert sparsifier.skipped == 1
