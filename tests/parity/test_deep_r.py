"""DeepR (Bellec et al. 2018, https://arxiv.org/abs/1711.05136), against the paper's θ: w = sign · θ, active where θ >= 0."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import dst
from dst import methods
from dst.amounts import BelowZero
from dst.errors import ConfigurationError
from dst.perturbations import Langevin
from dst.scores import KeptSign
from dst.types import LayerView

LR, L1, STEPS = 0.1, 0.05, 30


def build(temperature=0.0, seed=0, **options):
    torch.manual_seed(0)
    model = nn.Linear(12, 10, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    method = methods.deep_r(0.4, l1=L1, temperature=temperature, **options)
    return model, optimizer, dst.Sparsifier(model, optimizer, method, total_steps=STEPS, seed=seed)


def test_a_training_agrees_with_the_recurrence_of_theta():
    """θ ← θ - η · ∂E/∂θ - η · α; connections whose θ falls below 0 are dropped, and as many are grown at θ = 0 with their sign."""
    model, optimizer, sparsifier = build()
    mask, signs = sparsifier.masks["weight"].clone(), None
    theta = model.weight.detach().abs()
    turnover = returned = 0
    ever = mask.clone()
    for step in range(STEPS):
        gradient = torch.randn(10, 12, generator=torch.Generator().manual_seed(step))
        model.weight.grad = gradient.clone()
        before = sparsifier.masks["weight"]
        sparsifier.before_step()
        if signs is None:
            signs = sparsifier.state_dict()["buffers"]["drop/weight"]
            assert torch.equal(signs[mask], model.weight.detach()[mask].sign().to(torch.int8))
            assert set(signs.flatten().tolist()) == {-1, 1}
            assert abs(float(signs.float().mean())) < 0.5
        after = sparsifier.masks["weight"]
        assert torch.equal(before & ~after, before & (theta < 0))  # all that crossed, and no other
        grown = after & ~before
        theta[~after] = 0
        assert not model.weight.detach()[grown].any()
        turnover += int(grown.sum())
        returned += int((grown & ever).sum())
        ever |= grown
        theta = torch.where(after, theta - LR * gradient * signs - LR * L1, theta)
        optimizer.step()
        torch.testing.assert_close(model.weight.detach(), torch.where(after, signs * theta, 0.0), rtol=0, atol=1e-6)
        theta = model.weight.detach() * signs  # no drift of rounding between the two
        assert int(after.sum()) == 48
    assert turnover > 50
    assert returned > 0
    assert torch.equal(sparsifier.state_dict()["buffers"]["drop/weight"], signs)
    assert sparsifier.step_counts == {"dense": 0, "sparse": STEPS, "dense_gradient": 0}


def test_signs_are_drawn_from_the_seed():
    def signs(seed):
        model, _, sparsifier = build(seed=seed)
        model.weight.grad = torch.zeros(10, 12)
        sparsifier.before_step()
        return sparsifier.state_dict()["buffers"]["drop/weight"]

    assert torch.equal(signs(1), signs(1))
    assert not torch.equal(signs(1), signs(2))


def test_growth_is_uniform_over_dormant_connections():
    grown = torch.zeros(10, 12)
    for seed in range(60):
        model, optimizer, sparsifier = build(seed=seed)
        first = sparsifier.masks["weight"]
        model.weight.grad = torch.zeros(10, 12)
        sparsifier.before_step()
        with torch.no_grad():
            model.weight.neg_()  # all have crossed
        optimizer.step()
        sparsifier.before_step()
        new = sparsifier.masks["weight"]
        assert not (new & first).any()
        grown += new
    share = grown / 60
    assert float(share.min()) > 0.05
    assert float(share.max()) < 0.8
    assert float(share.mean()) == pytest.approx(0.4)


def test_the_pull_and_the_noise_of_a_step():
    signs = torch.tensor([[1, -1] * 5000], dtype=torch.int8)
    mask = torch.ones(1, 10_000, dtype=torch.bool)
    mask[0, :100] = False
    view = LayerView(torch.zeros(1, 10_000), mask, None, signs, torch.Generator().manual_seed(0))
    pull = Langevin(0.25, 0.0)(view, 0.1)
    assert torch.equal(pull, 0.25 * signs * mask)
    temperature, lr = 0.02, 0.1
    step = -lr * Langevin(0.25, temperature)(view, lr)  # what SGD makes of it
    assert not step[0, :100].any()
    noise = (step + lr * 0.25 * signs)[0, 100:]
    assert float(noise.std()) == pytest.approx(math.sqrt(2 * lr * temperature), rel=0.03)
    assert abs(float(noise.mean())) < 4 * math.sqrt(2 * lr * temperature / 9900)
    assert not Langevin(0.0, temperature)(view, 0.0).any()


def test_without_a_buffer_signs_are_the_weights_own():
    view = LayerView(torch.tensor([-2.0, 0.0, 3.0]), torch.ones(3).bool(), None, None, torch.Generator())
    assert Langevin(0.5)(view, 1.0).tolist() == [-0.5, 0, 0.5]


def test_noise_is_another_at_every_step_and_the_same_after_a_resume():
    def run(steps, state=None):
        model, optimizer, sparsifier = build(temperature=0.1)
        if state is not None:
            model.load_state_dict(state[0])
            sparsifier.load_state_dict(state[1])
        grads = []
        for _ in range(steps):
            model.weight.grad = torch.zeros(10, 12)
            sparsifier.before_step()
            grads.append(model.weight.grad.clone())
            optimizer.step()
        return grads, (model.state_dict(), sparsifier.state_dict())

    whole, _ = run(4)
    assert not torch.equal(whole[0], whole[1])
    _, middle = run(2)
    rest, _ = run(2, middle)
    assert torch.equal(torch.stack(rest), torch.stack(whole[2:]))


def test_how_many_go():
    score = torch.tensor([[-1.0, 0.0, 2.0, -3.0, -0.0]])
    view = LayerView(score, torch.tensor([[True, True, True, False, True]]), None, None, torch.Generator())
    assert BelowZero().counts([view], [score], 0.0) == ([1], 0.0)


def test_no_gradient_is_needed_for_signs():
    assert KeptSign().observes
    assert not KeptSign().needs_gradient
    model, _, sparsifier = build()
    assert not methods.deep_r(0.4).reads_gradient
    assert sparsifier.needs_dense_gradient(model.weight)  # an update is due, and the step moves what it grows
    model, _, sparsifier = build(start=5)
    assert not sparsifier.needs_dense_gradient(model.weight)


@pytest.mark.parametrize("settings", [{"l1": -1.0}, {"temperature": -1e-9}, {"l1": math.nan}])
def test_settings_out_of_range(settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        methods.deep_r(0.4, **settings)


def test_csr_is_refused():
    with pytest.raises(ConfigurationError, match="which need masks"):
        methods.deep_r(0.4, backend="csr")
