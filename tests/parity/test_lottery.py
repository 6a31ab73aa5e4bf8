"""Iterative magnitude pruning (Frankle & Carbin 2019, https://arxiv.org/abs/1803.03635; Frankle et al. 2020,
https://arxiv.org/abs/1912.05671): 20% of the remaining weights go after each level, by global magnitude, so that level n
keeps 0.8 to the n."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dst.allocation import Global
from dst.engine.lottery import level_densities, prune
from dst.topology.layers import find_layers


def test_level_n_keeps_four_fifths_to_the_n():
    densities = level_densities(0.05)
    assert densities[:-1] == pytest.approx([0.8**n for n in range(len(densities) - 1)])
    assert 0.8 ** (len(densities) - 1) <= densities[-1] == 0.05 < densities[-2]


def test_levels_of_a_hundred_weights():
    """100, 80, 64, 51.2, 40.96: a fraction of a weight is kept."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(10, 6))
    layers, _ = find_layers(model)
    weights = {layer.parameter: model.get_parameter(layer.parameter) for layer in layers}
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    kept = []
    for density in level_densities(0.4)[1:5]:
        before, masks = masks, prune(layers, weights, masks, density, Global())
        kept.append(sum(int(mask.sum()) for mask in masks.values()))
        survivors = torch.cat([weights[n][masks[n]].abs() for n in masks])
        pruned = torch.cat([weights[n][before[n] & ~masks[n]].abs() for n in masks])
        assert pruned.max() <= survivors.min()  # one threshold for the whole network
    assert kept == [80, 64, 52, 41]
