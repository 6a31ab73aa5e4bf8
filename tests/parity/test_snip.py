"""SNIP (Lee et al. 2019, https://arxiv.org/abs/1810.02340) as ``rigl/sparse_optimizers_test.py`` of google-research/rigl
asserts it: zeros = floor(S · N), and the largest abs(g · w) dropped is at most the smallest kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dst
from dst import methods
from dst.allocation import Uniform
from dst.init import Snip


@pytest.mark.parametrize(("shape", "sparsity", "zeros"), [((3, 4), 0.5, 6), ((5, 3), 0.8, 12), ((8, 5), 0.8, 32)])
@pytest.mark.parametrize("seed", range(3))
def test_the_most_sensitive_connections_are_kept(shape, sparsity, zeros, seed):
    torch.manual_seed(seed)
    model = nn.Linear(shape[1], shape[0], bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    method = methods.static(round(1 - sparsity, 6), init=Snip(), allocation=Uniform())
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=10)
    assert sparsifier.masks["weight"].all()
    before = model.weight.detach().clone()
    model(torch.randn(7, shape[1])).square().sum().backward()
    sensitivity = (model.weight.grad * before).abs()
    sparsifier.before_step()
    optimizer.step()
    mask = sparsifier.masks["weight"]
    assert int((~mask).sum()) == zeros
    assert sensitivity[~mask].max() <= sensitivity[mask].min()
    assert torch.equal(model.weight.detach(), before * mask)  # the step changed the mask alone
