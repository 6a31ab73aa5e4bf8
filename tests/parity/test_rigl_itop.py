"""RigL-ITOP (Liu et al. 2021, https://arxiv.org/abs/2102.02887): the settings of the authors' code, and their effect."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import dst
from dst import methods
from dst.schedules import Cosine
from tests.parity.replacement import drop_smallest, grow_largest
from tests.small import Small, random_gradients


def test_the_authors_settings_for_cifar():
    """250 epochs of 391 batches: updates at steps 4000, 8000, …, 96,000, of half the connections at first."""
    steps = 250 * 391
    clock = methods.rigl_itop(0.05, update_every=4000, start=4000).clock
    fired = [step for step in range(steps) if clock.fires(step, steps)]
    assert fired == list(range(4000, steps, 4000))
    assert len(fired) == 24
    shares = methods.rigl_itop(0.05).clock
    found = [step for step in range(steps) if shares.fires(step, steps)]
    assert found[0] == 3910
    assert len(found) == 24
    fraction = methods.rigl_itop(0.05).fraction
    assert fraction(0, steps) == 0.5
    assert fraction(48_875, steps) == pytest.approx(0.25)
    assert fraction(steps, steps) == pytest.approx(0)


def test_it_is_rigl_but_for_its_settings():
    expected = methods.rigl(
        0.1, update_every=0.04, start=0.04, stop=1.0, fraction=Cosine(0.5), replace_step=False, grown_warmup=3
    )
    assert methods.rigl_itop(0.1, grown_warmup=3) == replace(expected, name="rigl_itop")


def test_a_training_agrees_with_a_loop():
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = dst.Sparsifier(model, optimizer, methods.rigl_itop(0.3, update_every=0.2, start=0.2), total_steps=20)
    changed = 0
    for step in range(20):
        random_gradients(model, step)
        expected = {n: m.clone() for n, m in sparsifier.masks.items()}
        if step in (4, 8, 12, 16):
            fraction = 0.25 * (1 + math.cos(math.pi * step / 20))
            for layer in sparsifier.layers:
                mask = layer.part(expected[layer.parameter])
                parameter = model.get_parameter(layer.parameter)
                flat, weight = mask.flatten(), layer.part(parameter.detach()).flatten()
                gradient = layer.part(parameter.grad).flatten().abs()
                if flat.all():
                    continue
                number = math.floor(fraction * int(flat.sum()))
                drop_smallest(flat, weight, number)
                grow_largest(flat, gradient, number)
                mask.copy_(flat.view(mask.shape))
        sparsifier.before_step()
        changed += not all(torch.equal(m, expected[n]) for n, m in sparsifier.masks.items())
        assert changed == 0
        optimizer.step()
    assert sparsifier.updates == 4
    assert sparsifier.exploration_rate > 0.5


def test_csr():
    assert methods.rigl_itop(0.1, backend="csr").backend == "csr"
