"""Sparse momentum (Dettmers & Zettlemoyer 2019, https://arxiv.org/abs/1907.04840), against a loop written from section 3."""

from __future__ import annotations

import math

import pytest
import torch

import dst
from dst import methods
from dst.redistribute import MeanMomentum, apportion
from dst.schedules import Cosine
from dst.types import LayerStat, LayerView
from tests.parity.replacement import drop_smallest, grow_largest
from tests.small import Small, random_gradients

BETA, STEPS, EVERY = 0.9, 12, 3


def split(total, shares, limits):
    """Real numbers in proportion to shares; the others take what does not fit, in proportion."""
    full = set()
    while True:
        others = [i for i in range(len(shares)) if i not in full]
        left = total - sum(limits[i] for i in full)
        exact = {i: left * shares[i] / sum(shares[j] for j in others) for i in others}
        over = {i for i in others if exact[i] > limits[i]}
        if not over:
            return [exact.get(i, limits[i]) for i in range(len(shares))]
        full |= over


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_a_training_agrees_with_a_loop(rate):
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = methods.snfs(0.3, update_every=EVERY, fraction=Cosine(rate))
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=STEPS)
    layers, weights = sparsifier.layers, dict(model.named_parameters())
    mine = [layer.part(sparsifier.masks[layer.parameter]).flatten().clone() for layer in layers]
    momentum = [torch.zeros(layer.weights) for layer in layers]
    first = [int(mask.sum()) for mask in mine]
    for step in range(STEPS):
        random_gradients(model, step)
        values = [layer.part(weights[layer.parameter].detach()).flatten().clone() for layer in layers]
        for m, layer in zip(momentum, layers, strict=True):
            m.mul_(BETA).add_(layer.part(weights[layer.parameter].grad).flatten(), alpha=1 - BETA)
        if step % EVERY == 0:
            fraction = rate / 2 * (1 + math.cos(math.pi * step / STEPS))
            strength = [float(m[mask].abs().mean()) for m, mask in zip(momentum, mine, strict=True)]
            removed = [math.floor(fraction * int(mask.sum())) for mask in mine]
            for mask, value, number in zip(mine, values, removed, strict=True):
                drop_smallest(mask, value, number)
            ideal = split(sum(removed), strength, [int((~mask).sum()) for mask in mine])
        sparsifier.before_step()
        optimizer.step()
        if step % EVERY == 0:
            # The definition leaves rounding open: whole numbers of the same sum, none further than one from its share.
            now = [layer.part(sparsifier.masks[layer.parameter]).flatten() for layer in layers]
            grown = [int((new & ~mask).sum()) for new, mask in zip(now, mine, strict=True)]
            assert sum(grown) == sum(removed)
            assert all(abs(number - share) < 1 for number, share in zip(grown, ideal, strict=True))
            for mask, m, number in zip(mine, momentum, grown, strict=True):
                grow_largest(mask, m, number)
        for layer, mask in zip(layers, mine, strict=True):
            assert torch.equal(layer.part(sparsifier.masks[layer.parameter]).flatten(), mask), (step, layer.label)
    assert [int(mask.sum()) for mask in mine] != first
    assert sum(int(mask.sum()) for mask in mine) == sum(first)


def test_a_layers_strength_is_the_mean_momentum_of_its_active_weights():
    mask = torch.tensor([True, False, True, True])
    momentum = torch.tensor([-3.0, 100.0, 1.0, 2.0])
    view = LayerView(torch.zeros(4), mask, None, momentum, torch.Generator())
    assert MeanMomentum().measure(view) == 2.0
    without_buffer = LayerView(torch.zeros(4), mask, 2 * momentum, None, torch.Generator())
    assert MeanMomentum().measure(without_buffer) == 4.0


@pytest.mark.parametrize(
    ("total", "shares", "limits", "expected"),
    [
        (10, [1, 1, 2], [9, 9, 9], [3, 2, 5]),  # of equal remainders the first
        (10, [0, 1, 4], [9, 9, 9], [0, 2, 8]),
        (10, [1, 1, 8], [9, 9, 4], [3, 3, 4]),  # what the full one cannot take goes to the others
        (10, [0, 0, 8], [9, 9, 4], [3, 3, 4]),  # claims of none: room decides
        (10, [math.nan, 1, math.inf], [9, 10, 9], [0, 10, 0]),
        (0, [1, 2], [0, 0], [0, 0]),
        (7, [1e-9, 1e9], [7, 3], [4, 3]),
    ],
)
def test_apportioning(total, shares, limits, expected):
    assert apportion(total, shares, limits) == expected
    with pytest.raises(ValueError, match="cannot split"):
        apportion(sum(limits) + 1, shares, limits)


def test_growth_follows_strength():
    stats = [LayerStat(weights=20, kept=5, strength=s) for s in (0.1, 0.3)]
    assert MeanMomentum().grow_counts(stats, 12) == [3, 9]


def test_redistribution_by_gradients_without_a_running_mean():
    """With random growth the strength is that of this step's gradient: the layer whose gradient is large gets all."""
    model = torch.nn.Sequential(torch.nn.Linear(20, 20, bias=False), torch.nn.Linear(20, 20, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = methods.snfs(0.3, update_every=1, grow=dst.scores.Random())
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=10)
    assert [row["nonzero"] for row in sparsifier.layer_table()] == [120, 120]
    model[0].weight.grad, model[1].weight.grad = torch.zeros(20, 20), torch.ones(20, 20)
    assert sparsifier.needs_dense_gradient(model[0].weight)
    sparsifier.before_step()
    assert [row["nonzero"] for row in sparsifier.layer_table()] == [60, 180]
    optimizer.step()
    assert sparsifier.step_counts["dense_gradient"] == 1


def test_a_layer_that_is_full_gives_back():
    model = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 10, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    method = methods.snfs(0.55, update_every=1, grow=dst.scores.Random(), fraction=dst.schedules.Constant(0.9))
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=10)
    shares = []
    for step in range(2):
        model[0].weight.grad, model[1].weight.grad = torch.ones(10, 10) * (step == 0), torch.ones(10, 10) * (step == 1)
        sparsifier.before_step()
        optimizer.step()
        shares.append([row["nonzero"] for row in sparsifier.layer_table()])
    assert shares == [[100, 10], [10, 100]]


def test_no_layer_is_left_without_a_connection():
    model = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 10, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    method = methods.snfs(0.5, update_every=1, grow=dst.scores.Random(), fraction=dst.schedules.Constant(1.0))
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=10)
    model[0].weight.grad, model[1].weight.grad = torch.ones(10, 10), torch.zeros(10, 10)
    sparsifier.before_step()
    assert [row["nonzero"] for row in sparsifier.layer_table()] == [99, 1]
