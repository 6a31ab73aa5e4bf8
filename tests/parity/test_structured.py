"""RigL with blocks and with diagonals, against RigL's rule computed group by group (Evci et al. 2020, Algorithm 1)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dst
from dst import methods
from dst.allocation import Uniform
from dst.patterns import Block, Diagonal
from dst.schedules import Constant


def blocks(rows, columns):
    return [
        [(r + i, c + j) for i in range(4) for j in range(4)] for r in range(0, rows, 4) for c in range(0, columns, 4)
    ]


def diagonals(rows, columns):
    return [[(i, (i + d) % columns) for i in range(rows)] for d in range(columns)]


@pytest.mark.parametrize(("make", "groups_of"), [(methods.rigl_block, blocks), (methods.dynadiag, diagonals)])
def test_updates(make, groups_of):
    torch.manual_seed(1)
    model = nn.Linear(16, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = make(0.5, update_every=1, allocation=Uniform(), fraction=Constant(0.5))
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=10)
    groups = groups_of(8, 16)
    for _ in range(4):
        with torch.no_grad():
            model.weight.copy_(torch.randn(8, 16) * sparsifier.masks["weight"])
        gradient = torch.randn(8, 16)
        model.weight.grad = gradient.clone()
        mask = sparsifier.masks["weight"]

        def mean(values, group):
            return sum(abs(float(values[p])) for p in group) / len(group)

        active = [g for g in groups if mask[g[0]]]
        assert all(bool(mask[p]) == (g in active) for g in groups for p in g)
        drop = len(active) // 2
        survivors = sorted(active, key=lambda g: mean(model.weight.detach(), g))[drop:]
        free = [g for g in groups if g not in survivors]
        chosen = survivors + sorted(free, key=lambda g: -mean(gradient, g))[:drop]
        expected = torch.zeros(8, 16, dtype=torch.bool)
        for group in chosen:
            for p in group:
                expected[p] = True
        sparsifier.before_step()
        optimizer.step()
        assert torch.equal(sparsifier.masks["weight"], expected)


def test_published_settings():
    assert (methods.rigl_block(0.1).pattern, methods.dynadiag(0.1).pattern) == (Block(4, 4), Diagonal())
