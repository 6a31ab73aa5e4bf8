"""MEST (Yuan et al. 2021, https://arxiv.org/abs/2110.14032): elastic mutation, with and without the soft memory bound."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import dst
from dst import methods
from dst.errors import ConfigurationError
from dst.schedules import Constant, Cosine, Linear
from dst.scores import Magnitude, MagnitudeAndGradient
from dst.types import LayerView

STEPS = 20


def test_the_score_by_hand():
    weight, gradient = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([-4.0, 0.0, 1.0])
    view = LayerView(weight, torch.ones(3).bool(), gradient, None, torch.Generator())
    assert MagnitudeAndGradient(0.5)(view).tolist() == [3.0, 2.0, 1.0]
    assert MagnitudeAndGradient(0.0)(view).tolist() == [1.0, 2.0, 0.5]
    with pytest.raises(ConfigurationError, match="strength=-1"):
        MagnitudeAndGradient(-1.0)


def steps(method):
    """Step, mask before, weight, gradient, mask after, at every step of a training of 300 weights, 90 of them active."""
    torch.manual_seed(0)
    model = nn.Linear(20, 15, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=STEPS)
    for step in range(STEPS):
        gradient = torch.randn(15, 20, generator=torch.Generator().manual_seed(step))
        model.weight.grad = gradient.clone()
        before, weight = sparsifier.masks["weight"], model.weight.detach().clone()
        sparsifier.before_step()
        after = sparsifier.masks["weight"]
        assert not model.weight.detach()[after & ~before].any()
        yield step, before, weight, gradient, after
        optimizer.step()


def lowest(before, weight, gradient, number, strength=1.0):
    """The mask of the active connections with the lowest importance."""
    importance = (weight.abs() + strength * gradient.abs()).masked_fill(~before, math.inf)
    chosen = torch.zeros(before.numel(), dtype=torch.bool)
    chosen[importance.flatten().argsort()[:number]] = True
    return chosen.view(before.shape)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_elastic_mutation_replaces_the_least_important(strength):
    method = methods.mest(0.3, update_every=3, fraction=Linear(0.4), drop=MagnitudeAndGradient(strength))
    replaced = []
    for step, before, weight, gradient, after in steps(method):
        if step % 3 == 0 and step < 15:
            # 0.4 · (1 - step / 15) of 90: 36, 28.8, 21.6, 14.4 and 7.2
            number = (36, 28, 21, 14, 7)[step // 3]
            assert torch.equal(before & ~after, lowest(before, weight, gradient, number, strength))
            replaced.append(int((after & ~before).sum()))
        else:
            assert torch.equal(before, after)
        assert int(after.sum()) == 90
    assert replaced == [36, 28, 21, 14, 7]


def test_the_soft_bound_holds_old_and_new_until_the_next_update():
    counts = []
    for step, before, weight, gradient, after in steps(methods.mest(0.3, update_every=3, surplus=Constant(0.2))):
        if step % 3 == 0 and step <= 15:
            lost = int(before.sum()) - 90
            dropped = lowest(before, weight, gradient, lost)
            assert torch.equal(before & ~after, dropped)
            assert int((after & ~before).sum()) == (18 if step < 15 else 0)
        else:
            assert torch.equal(before, after)
        counts.append(int(after.sum()))
    assert counts == [108] * 15 + [90] * 5


def test_a_surplus_may_shrink():
    counts = [int(after.sum()) for *_, after in steps(methods.mest(0.3, update_every=5, surplus=Cosine(0.2)))]
    assert [counts[0], counts[5], counts[10]] == [108, 103, 94]  # 0.2, 0.15 and 0.05 of 90 on top
    assert counts[15:] == [90] * 5


@pytest.mark.parametrize("every", [3, 19])  # the last step updates by itself, or for the surplus alone
def test_a_surplus_to_the_end_goes_with_the_last_step(every):
    method = methods.mest(0.3, update_every=every, stop=1.0, surplus=Constant(0.2))
    counts = [int(after.sum()) for *_, after in steps(method)]
    assert counts == [108] * 19 + [90]


def test_what_a_surplus_does_not_combine_with():
    with pytest.raises(ConfigurationError, match="surplus does not combine with redistribute or amount"):
        replace(methods.dsr(0.3), surplus=Constant(0.2))
    with pytest.raises(ConfigurationError, match="changes the number of a layer's connections"):
        methods.mest(0.3, surplus=Constant(0.2), drop=Magnitude(), backend="csr")
    with pytest.raises(ConfigurationError, match="no drop score of the active weights alone"):
        methods.mest(0.3, backend="csr")
