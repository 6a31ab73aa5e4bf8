"""GraNet (Liu et al. 2021, https://arxiv.org/abs/2106.10404, Algorithm 1) against a loop, and densities that move."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import nn

import dst
from dst import methods
from dst.allocation import ERK, Global
from dst.amounts import BelowThreshold
from dst.errors import ConfigurationError
from dst.schedules import Constant, Cubic, Stepwise
from tests.small import Small, random_gradients

STEPS, EVERY, STOP = 20, 3, 15


def sparsity(step, initial, final, start=0, stop=STOP):
    """s_t = s_f + (s_i - s_f)(1 - p)^3 as a fraction, of decimals."""
    initial, final = Fraction(str(initial)), Fraction(str(final))
    progress = min(Fraction(1), max(Fraction(0), Fraction(step - start, stop - start)))
    return final + (initial - final) * (1 - progress) ** 3


def kept(total, s):
    """What floor(s · total) zeros leave, without an error of rounding."""
    return total - math.floor(Fraction(str(s)) * total)


@pytest.mark.parametrize(
    ("step", "density"), [(0, 1.0), (10, 1.0), (20, 0.2125), (25, 0.1140625), (30, 0.1), (40, 0.1), (99, 0.1)]
)
def test_the_cubic_schedule_by_hand(step, density):
    """From 1 to 0.1 within [10, 30]: at 20 half is over, and density is 0.1 + 0.9 / 8."""
    schedule = Cubic(1.0, 10, 30)
    assert schedule(step, 100, 0.1) == pytest.approx(density)
    assert 1 - schedule(step, 100, 0.1) == pytest.approx(float(sparsity(step, 0.0, 0.9, 10, 30)))


def global_loop(initial, steps_with_update, regrow):
    """Run the method beside a loop of its definition; yields nothing but compares the masks of every step."""
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    make = methods.granet if regrow else methods.gmp
    method = make(0.2, update_every=EVERY, initial_density=initial, stop=STOP, allocation=Global())
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=STEPS)
    layers, total = sparsifier.layers, sum(layer.weights for layer in sparsifier.layers)
    mine = [layer.part(sparsifier.masks[layer.parameter]).flatten().clone() for layer in layers]
    trace = [sum(int(m.sum()) for m in mine)]
    for step in range(STEPS):
        random_gradients(model, step)
        values = [layer.part(model.get_parameter(layer.parameter).detach()).flatten().clone() for layer in layers]
        gradients = [layer.part(model.get_parameter(layer.parameter).grad).flatten().abs() for layer in layers]
        if step in steps_with_update:
            budget = kept(total, sparsity(step, 1 - initial, 0.8))
            everything = torch.cat([v.abs().masked_fill(~m, -1) for v, m in zip(values, mine, strict=True)])
            if budget < sum(int(m.sum()) for m in mine):
                chosen = torch.zeros(total, dtype=torch.bool)
                chosen[everything.argsort(descending=True)[:budget]] = True
                mine = list(chosen.split([layer.weights for layer in layers]))
            fraction = 0.25 * (1 + math.cos(math.pi * step / STOP)) if regrow and step < STOP else 0
            for mask, value, gradient in zip(mine, values, gradients, strict=True):
                assert mask.any()
                if mask.all():
                    continue
                active = mask.nonzero().squeeze(1)
                number = math.floor(fraction * len(active))
                mask[active[value[active].abs().argsort()[:number]]] = False
                free = (~mask).nonzero().squeeze(1)
                mask[free[gradient[free].argsort(descending=True)[:number]]] = True
        sparsifier.before_step()
        for layer, mask in zip(layers, mine, strict=True):
            assert torch.equal(layer.part(sparsifier.masks[layer.parameter]).flatten(), mask), (step, layer.label)
        optimizer.step()
        trace.append(sum(int(m.sum()) for m in mine))
    assert trace[-1] == kept(total, 0.8) == sparsifier.active
    assert trace == sorted(trace, reverse=True)
    return sparsifier, trace


UPDATES = [0, 3, 6, 9, 12, 15]


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
