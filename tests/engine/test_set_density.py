"""``Sparsifier.set_density``: exact at once, in both directions, without touching what stays, and resumable."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import dst
from dst import ConfigurationError, StateError, methods
from dst.allocation import ERK, Global, Uniform
from dst.patterns import NM, Block
from dst.schedules import Constant
from dst.scores import Magnitude, Momentum
from dst.topology.optimizer_state import per_weight_state
from tests.checks import check_density
from tests.sampling import rotated
from tests.small import backward, sparsified, train

METHODS = {
    "dense": lambda: methods.dense(),
    "static": lambda: methods.sparse_from_scratch(0.3),
    "set": lambda: methods.set_(0.3, update_every=4),
    "rigl": lambda: methods.rigl(0.3, update_every=4),
    "global": lambda: methods.rigl(0.3, update_every=4, allocation=Global()),
    "momentum": lambda: methods.rigl(0.3, update_every=4, grow=Momentum(), drop=Momentum()),
    "snfs": lambda: methods.snfs(0.3, update_every=4),
    "deep_r": lambda: methods.deep_r(0.3),
    "dsr": lambda: methods.dsr(0.3, update_every=4),
    "mest_soft_bound": lambda: methods.mest(0.3, update_every=4, surplus=Constant(0.2)),
    "granet": lambda: methods.granet(0.3, update_every=4),
    "gmp": lambda: methods.gmp(0.3, update_every=4),
    "ac_dc": lambda: methods.ac_dc(0.3, phase=4, start=2),
    "warmed_up": lambda: methods.set_(0.3, update_every=4, grown_warmup=3),
    "blocks": lambda: replace(methods.rigl(0.3, update_every=4), pattern=Block(2, 2)),
}


def snapshot(model, optimizer, sparsifier):
    named = {n: model.get_parameter(n) for n in sparsifier.masks}
    state = {n: {k: v.clone() for k, v in per_weight_state(optimizer, p)} for n, p in named.items()}
    return sparsifier.masks, {n: p.detach().clone() for n, p in named.items()}, state


@pytest.mark.parametrize(("name", "steps", "optimizer_name"), rotated(METHODS, [9, 0], ["adamw", "odd"]))
def test_counts_are_exact_and_survivors_untouched(name, steps, optimizer_name):
    model, optimizer, sparsifier = sparsified(METHODS[name](), optimizer_name)
    train(model, optimizer, sparsifier, steps)
    exact = name not in ("dense", "blocks", "mest_soft_bound", "gmp", "dsr", "snfs")
    for density in (0.15, 0.15, 0.6, 0.05, 1.0, 0.2):
        masks, weights, state = snapshot(model, optimizer, sparsifier)
        sparsifier.set_density(density)
        after, now, later = snapshot(model, optimizer, sparsifier)
        slack = 0 if exact else len(sparsifier.layers) * (4 if name == "blocks" else 1)
        check_density(sparsifier.active, density, sum(x.weights for x in sparsifier.layers), slack=slack)
        assert sparsifier.active == sum(row["nonzero"] for row in sparsifier.layer_table())
        assert sparsifier.active == sum(int(m.sum()) for m in after.values())
        for n, mask in after.items():
            kept, changed = mask & masks[n], mask ^ masks[n]
            assert torch.equal(now[n][kept], weights[n][kept])
            assert not now[n][changed].any()
            assert not now[n][~mask].any()
            for key, value in later[n].items():
                assert torch.equal(value[kept], state[n][key][kept])
                assert not value[changed].any()
        if density > sparsifier.method.density and name not in ("momentum",):
            assert all(not (masks[n] & ~m).any() for n, m in after.items()) or density < 0.6


@pytest.mark.parametrize("name", METHODS)
def test_the_density_stays_and_training_continues(name):
    model, optimizer, sparsifier = sparsified(METHODS[name](), "adamw")
    train(model, optimizer, sparsifier, 6)
    sparsifier.set_density(0.5)
    first, churned = sparsifier.active, False
    for _ in range(18):
        before = sparsifier.masks
        train(model, optimizer, sparsifier, 1)
        churned = churned or not all(torch.equal(m, before[n]) for n, m in sparsifier.masks.items())
        for n, mask in sparsifier.masks.items():
            assert not model.get_parameter(n).detach()[~mask].any()
        if name != "mest_soft_bound":
            assert sparsifier.active == first
    assert sparsifier.active == first
    assert churned == (name not in ("dense", "static", "gmp", "ac_dc"))


@pytest.mark.parametrize(("name", "optimizer_name"), rotated(METHODS, ["adamw", "odd"]))
def test_a_resume_in_between_is_exact(name, optimizer_name):
    def everything(model, optimizer, sparsifier):
        return copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"], sparsifier.state_dict()])

    run = sparsified(METHODS[name](), optimizer_name)
    train(*run, 5)
    run[2].set_density(0.5)
    saved = everything(*run)
    optimizer_state = copy.deepcopy(run[1].state_dict())
    train(*run, 4)
    run[2].set_density(0.1)
    train(*run, 5)
    again = sparsified(METHODS[name](), optimizer_name)
    again[0].load_state_dict(saved[0])
    again[2].load_state_dict(saved[2])
    again[1].load_state_dict(optimizer_state)
    assert again[2].density == pytest.approx(0.5, abs=0.02)
    train(*again, 4)
    again[2].set_density(0.1)
    train(*again, 5)
    first, second = everything(*run), everything(*again)
    assert str(first[2]["layers"]) == str(second[2]["layers"])
    for a, b in (
        (first[0], second[0]),
        (first[2]["masks"], second[2]["masks"]),
        (first[2]["buffers"], second[2]["buffers"]),
    ):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_what_goes_and_comes():
    """The smallest magnitudes go; the largest gradients come where there are some, random ones where there are none."""
    model = nn.Linear(20, 10, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = dst.Sparsifier(model, optimizer, methods.rigl(0.5), total_steps=10)
    magnitude = model.weight.detach().abs().flatten().clone()
    sparsifier.set_density(0.2)
    assert set(sparsifier.masks["weight"].flatten().nonzero().flatten().tolist()) == set(
        magnitude.argsort()[-40:].tolist()
    )
    before = sparsifier.masks["weight"].flatten()
    model.weight.grad = torch.randn(10, 20)
    gradient = model.weight.grad.abs().flatten().masked_fill(before, -1)
    sparsifier.set_density(0.3)
    grown = (sparsifier.masks["weight"].flatten() & ~before).nonzero().flatten()
    assert set(grown.tolist()) == set(gradient.argsort()[-20:].tolist())
    model.weight.grad = None
    sparsifier.set_density(0.6)
    assert sparsifier.active == 120


def test_layers_follow_the_allocation():
    shapes = [(40, 50), (10, 40)]
    for allocation in (ERK(), Uniform()):
        model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 10))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        sparsifier = dst.Sparsifier(model, optimizer, methods.rigl(0.5, allocation=allocation), total_steps=10)
        for density in (0.1, 0.3):
            sparsifier.set_density(density)
            found = [row["nonzero"] for row in sparsifier.layer_table()]
            assert found == allocation.counts(["0", "1"], shapes, density)


def test_a_network_wide_budget_is_pruned_by_one_threshold_and_grows_in_proportion():
    model = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 20, bias=False))
    with torch.no_grad():
        model[1].weight.mul_(1.3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = dst.Sparsifier(model, optimizer, methods.rigl(0.6, allocation=Global()), total_steps=10)
    magnitude = torch.cat([(p.detach() * sparsifier.masks[n]).abs().flatten() for n, p in model.named_parameters()])
    sparsifier.set_density(0.1)
    chosen = torch.cat([m.flatten() for m in sparsifier.masks.values()]).nonzero().flatten()
    assert set(chosen.tolist()) == set(magnitude.argsort()[-80:].tolist())
    small, large = (row["nonzero"] for row in sparsifier.layer_table())
    assert large > 2 * small > 6
    sparsifier.set_density(0.2)
    assert [row["nonzero"] for row in sparsifier.layer_table()] == [
        pytest.approx(2 * small, abs=1),
        pytest.approx(2 * large, abs=1),
    ]


def test_budget_that_has_moved_stays_where_it_is():
    model = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 20, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    method = methods.snfs(0.3, update_every=1, grow=dst.scores.Random(), drop=Magnitude())
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=10)
    model[0].weight.grad, model[1].weight.grad = torch.zeros(20, 20), torch.ones(20, 20)
    sparsifier.before_step()
    optimizer.step()
    assert [row["nonzero"] for row in sparsifier.layer_table()] == [60, 180]
    before = sparsifier.masks
    sparsifier.set_density(0.1)
    assert [row["nonzero"] for row in sparsifier.layer_table()] == [20, 60]
    assert not any((m & ~before[n]).any() for n, m in sparsifier.masks.items())


@pytest.mark.parametrize("regrow", [True, False])
def test_patterns_hold(regrow):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    method = replace(methods.rigl(0.25, update_every=2, regrow_dropped=regrow), pattern=NM(m=4))
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=20)
    for density, ones in ((0.5, 2), (0.25, 1), (0.75, 3), (1.0, 4), (0.5, 2)):
        before = sparsifier.masks
        sparsifier.set_density(density)
        assert all((m.view(-1, 4).sum(1) == ones).all() for m in sparsifier.masks.values())
        if density == 0.25:
            assert not any((m & ~before[n]).any() for n, m in sparsifier.masks.items())
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 16)).square().mean().backward()
            sparsifier.before_step()
            optimizer.step()
        assert all((m.view(-1, 4).sum(1) == ones).all() for m in sparsifier.masks.values())
    with pytest.raises(ConfigurationError):
        sparsifier.set_density(0.3)
    assert sparsifier.density == 0.5


@pytest.mark.parametrize("density", [0, -0.1, 1.5, math.nan, True, "0.5", None])
def test_densities_out_of_range(density):
    _, _, sparsifier = sparsified(methods.rigl(0.3), "adamw")
    with pytest.raises(ConfigurationError, match="density="):
        sparsifier.set_density(density)
    assert sparsifier.density == pytest.approx(0.3, abs=0.01)


def test_a_density_that_cannot_hold_changes_nothing():
    model, optimizer, sparsifier = sparsified(methods.rigl(0.3), "adamw")
    before = sparsifier.state_dict()
    with pytest.raises(ConfigurationError, match="keeps 1 weights"):
        sparsifier.set_density(0.001)
    assert sparsifier.state_dict()["set_density"] is before["set_density"] is None
    train(model, optimizer, sparsifier, 2)


def test_where_it_cannot_be_set():
    _, _, sparsifier = sparsified(methods.static(0.3), "adamw")
    with pytest.raises(StateError, match="dense until step 6"):
        sparsifier.set_density(0.5)
    method = methods.set_(0.3, backend="csr")
    model = dst.prepare(nn.Sequential(nn.Linear(20, 20)), method)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ConfigurationError, match="fixed number of connections"):
        dst.Sparsifier(model, optimizer, method, total_steps=5).set_density(0.5)


def test_grown_gradients_are_used_after_a_backward_pass():
    """Set between backward and before_step, the gradient of what has grown is there."""
    model, optimizer, sparsifier = sparsified(methods.rigl(0.2, start=10), "adamw")
    backward(model, optimizer, 0)
    before = sparsifier.masks
    sparsifier.set_density(0.6)
    sparsifier.before_step()
    grown = {n: m & ~before[n] for n, m in sparsifier.masks.items()}
    optimizer.step()
    assert sum(int(model.get_parameter(n).detach()[m].count_nonzero()) for n, m in grown.items()) > 100
