"""Numbers of google-research/rigl, the RigL authors' code (Evci et al. 2020, https://github.com/google-research/rigl).

Counts are asserted by ``rigl/sparse_utils_test.py``, the update clock by ``rigl/sparse_optimizers_test.py``. The ERK
densities were computed by ``rigl/sparse_utils.py`` (``get_sparsities_erdos_renyi``), the cosine by
``rigl/sparse_optimizers_base.py``.

The budget that ERK splits is there the sum of the layers' own: every layer's N - floor(S · N), and not the density times the
total. On ResNet-50 the two differ by 26 weights, in the fifth digit of the densities.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import dst
from dst import methods
from dst.allocation import ERK, Uniform
from dst.schedules import Constant, Cosine, Every
from dst.topology.counts import count_active


@pytest.mark.parametrize(("shape", "sparsity", "ones"), [((30, 4), 0.5, 60), ((1, 2, 1, 4), 0.8, 2), ((30,), 0.1, 27)])
def test_mask_counts(shape, sparsity, ones):
    weights = math.prod(shape)
    assert count_active(weights, 1 - sparsity) == ones == weights - math.floor(sparsity * weights)


class Weight(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


@pytest.mark.parametrize(("shape", "density", "ones"), [((30, 4), 0.5, 60), ((1, 2, 1, 4), 0.2, 2)])
def test_masks_of_these_counts_are_made(shape, density, ones):
    model = Weight(shape)
    method = methods.rigl(density, allocation=Uniform())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=1, include=["weight"])
    assert int(sparsifier.masks["weight"].sum()) == ones


def test_update_clock():
    clock = Every(every=2, start=1, stop=4)
    assert [step for step in range(20) if clock.fires(step, 20)] == [1, 3]


@pytest.mark.parametrize("make", [methods.rigl, methods.set_])
def test_masks_change_at_updates_only_and_grown_weights_are_zero(make):
    model = nn.Linear(20, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = make(0.5, update_every=2, start=1, stop=4, replace_step=True, fraction=Constant(0.4))
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=10)
    changed = []
    for step in range(8):
        before = sparsifier.masks["weight"]
        model(torch.randn(6, 20)).square().sum().backward()
        sparsifier.before_step()
        optimizer.step()
        optimizer.zero_grad()
        after = sparsifier.masks["weight"]
        if not torch.equal(before, after):
            changed.append(step)
            assert not model.weight[after & ~before].any()
        assert int(after.sum()) == int(before.sum()) == 100
    assert changed == [1, 3]


@pytest.mark.parametrize("make", [methods.rigl, methods.set_])
def test_a_drop_fraction_of_zero_leaves_the_mask_as_it_was(make):
    model = nn.Linear(20, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = make(0.5, update_every=1, fraction=Constant(0.0))
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=10)
    first = sparsifier.masks["weight"].clone()
    for _ in range(5):
        model(torch.randn(6, 20)).square().sum().backward()
        sparsifier.before_step()
        optimizer.step()
    assert torch.equal(sparsifier.masks["weight"], first)
    assert sparsifier.updates == 5


def test_erk_small():
    densities = ERK().densities("abc", [(2, 4), (3, 6), (2, 4, 6)], 0.5)
    assert [1 - d for d in densities] == pytest.approx([0, 0.3095, 0.6548], abs=5e-5)


def resnet50() -> dict[str, tuple[int, ...]]:
    """Weights of ResNet-50's convolutions and classifier, by their usual names."""
    shapes: dict[str, tuple[int, ...]] = {"conv1": (64, 3, 7, 7)}
    inputs = 64
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), start=1):
        for block in range(blocks):
            prefix = f"layer{stage}.{block}"
            shapes[f"{prefix}.conv1"] = (width, inputs, 1, 1)
            shapes[f"{prefix}.conv2"] = (width, width, 3, 3)
            shapes[f"{prefix}.conv3"] = (4 * width, width, 1, 1)
            if block == 0:
                shapes[f"{prefix}.downsample.0"] = (4 * width, inputs, 1, 1)
            inputs = 4 * width
    shapes["fc"] = (1000, inputs)
    return shapes


def test_erk_resnet50():
    shapes = resnet50()
    assert sum(math.prod(s) for s in shapes.values()) == 25_502_912
    densities = dict(zip(shapes, ERK().densities(list(shapes), list(shapes.values()), 0.1), strict=True))
    assert [name for name, density in densities.items() if density == 1] == ["layer1.0.conv1"]
    expected = {"conv1": 0.42004, "layer1.0.conv2": 0.17734, "layer3.0.conv2": 0.04285, "fc": 0.07261}
    assert {name: densities[name] for name in expected} == pytest.approx(expected, abs=5e-6)
    for name in expected:
        epsilon = densities[name] * math.prod(shapes[name]) / sum(shapes[name])
        assert epsilon == pytest.approx(48.7866, abs=5e-5)
    counts = ERK().counts(list(shapes), list(shapes.values()), 0.1)
    assert abs(sum(counts) - 2_550_291.2) <= len(shapes)


@pytest.mark.parametrize(("step", "fraction"), [(0, 0.3), (100, 0.2999882), (12_500, 0.15), (25_000, 0.0)])
def test_cosine(step, fraction):
    assert Cosine(0.3)(step, 25_000) == pytest.approx(fraction, abs=5e-8)
