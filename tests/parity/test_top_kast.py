"""Top-KAST by its definition (Jayakumar et al. 2021, https://arxiv.org/abs/2106.03517, sections 2.1 to 2.3)."""

from __future__ import annotations

import torch
from torch import nn

import dst
from dst import methods


def largest(weight, count):
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[weight.abs().flatten().topk(count).indices] = True
    return mask.view_as(weight)


def test_top_kast():
    """A and B are the top 20% and 50% of the weights; gradients, and the regularisation's, on B alone."""
    torch.manual_seed(0)
    model = nn.Linear(10, 6)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    method = methods.top_kast(0.2, backward_density=0.5, decay=0.05)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=20)
    seen = set()
    for _ in range(20):
        inputs, target = torch.randn(8, 10), torch.randn(8, 6)
        a, b = largest(weight, 12), largest(weight, 30)
        seen.add(tuple(a.flatten().tolist()))
        assert torch.equal(sparsifier.masks["weight"], a)
        torch.testing.assert_close(model.weight.detach(), weight * a)

        sparse = (weight * a).requires_grad_()
        free = bias.clone().requires_grad_()
        (inputs @ sparse.T + free - target).square().sum().mul(0.1).backward()
        penalty = 0.05 * weight * a + 0.05 / 0.2 * weight * (b & ~a)
        weight = weight - 0.2 * (sparse.grad * b + penalty)
        bias = bias - 0.2 * free.grad

        optimizer.zero_grad()
        (model(inputs) - target).square().sum().mul(0.1).backward()
        sparsifier.before_step()
        optimizer.step()
        torch.testing.assert_close(sparsifier.state_dict()["latent"]["weight"], weight)
    assert len(seen) > 5  # the topology moved
