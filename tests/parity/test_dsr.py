"""Dynamic sparse reparameterization (Mostafa & Wang 2019, https://arxiv.org/abs/1902.05967, Algorithm 1), by hand and by a loop."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import dst
from dst import methods
from dst.amounts import BelowThreshold
from dst.errors import ConfigurationError
from dst.redistribute import Survivors
from dst.types import LayerStat, LayerView


def views(*weights):
    made = [torch.tensor(w) for w in weights]
    return [LayerView(w, w != 0, None, None, torch.Generator()) for w in made]


@pytest.mark.parametrize(
    ("target", "threshold", "dropped", "following"),
    [
        # abs(w) active: 1 2 3 4 and 1 5 6 7 8 9, ten in all
        (0.3, 2.5, [2, 1], 2.5),  # three of three
        (0.5, 2.5, [2, 1], 5.0),  # fewer than 4.5: twice the threshold next time
        (0.2, 2.5, [2, 1], 1.25),  # more than 2.2: half
        (0.3, 1.0, [0, 0], 2.0),  # strictly below
        (0.3, 4.5, [3, 1], 2.25),  # of four at most nine tenths at once: three
    ],
)
def test_the_threshold(target, threshold, dropped, following):
    layers = views([1.0, -2.0, 3.0, -4.0, 0.0], [-1.0, 5.0, 6.0, -7.0, 8.0, 9.0, 0.0])
    found = BelowThreshold(threshold, target).counts(layers, [v.weight.abs() for v in layers], threshold)
    assert found == (dropped, following)


def test_growth_follows_what_is_left():
    stats = [LayerStat(weights=100, kept=kept, strength=0.0) for kept in (30, 10)]
    assert Survivors().grow_counts(stats, 8) == [6, 2]
    full = [LayerStat(weights=32, kept=30, strength=0.0), LayerStat(weights=100, kept=10, strength=0.0)]
    assert Survivors().grow_counts(full, 8) == [2, 6]


def test_a_training_agrees_with_algorithm_1():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 10, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    threshold, target = 0.01, 0.2
    method = methods.dsr(0.3, update_every=2, amount=BelowThreshold(threshold, target))
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=20)
    seen = []
    for step in range(20):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        before, weights = sparsifier.masks, {n: p.detach().clone() for n, p in model.named_parameters()}
        sparsifier.before_step()
        after = sparsifier.masks
        if step % 2 == 0:
            low = {n: mask & (weights[n].abs() < threshold) for n, mask in before.items()}
            kept = {n: int((before[n] & ~low[n]).sum()) for n in before}
            lost = sum(int(m.sum()) for m in low.values())
            active = sum(int(m.sum()) for m in before.values())
            for n, mask in after.items():
                assert torch.equal(before[n] & ~mask, low[n])
                grown = mask & ~before[n]
                assert abs(int(grown.sum()) - lost * kept[n] / sum(kept.values())) < 1
                assert not model.get_parameter(n).detach()[grown].any()
            seen.append((threshold, lost))
            if lost < 0.9 * target * active:
                threshold *= 2
            elif lost > 1.1 * target * active:
                threshold /= 2
            assert sparsifier.state_dict()["amount"] == threshold
        else:
            assert all(torch.equal(before[n], mask) for n, mask in after.items())
        optimizer.step()
        assert sum(int(m.sum()) for m in after.values()) == 180
    assert {later[0] / earlier[0] for earlier, later in itertools.pairwise(seen)} >= {2.0}
    assert sum(lost for _, lost in seen) > 100


@pytest.mark.parametrize("settings", [{"initial": 0.0}, {"target": 1.0}, {"tolerance": -0.1}, {"most": 0.0}])
def test_settings_out_of_range(settings):
    with pytest.raises(ConfigurationError, match="threshold"):
        BelowThreshold(**settings)


def test_csr_is_refused():
    with pytest.raises(ConfigurationError, match="changes the number of a layer's connections"):
        methods.dsr(0.3, backend="csr")
