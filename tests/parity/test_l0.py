"""L0 gates by their definition (Louizos et al. 2018, https://arxiv.org/abs/1712.01312, equations 10 to 13), by autograd."""

from __future__ import annotations

import math

import torch
from torch import nn

import dst
from dst import methods
from dst.relaxations import pressure
from dst.topology.seeding import folded_generator


def test_l0():
    torch.manual_seed(0)
    model = nn.Linear(10, 6, bias=False)
    weight = nn.Parameter(model.weight.detach().clone())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    method = methods.l0(0.3, stop=12, learning_rate=0.2, penalty=0.5, initial=0.5)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=16)
    alpha = nn.Parameter(sparsifier.state_dict()["latent"]["weight/gate"].clone())
    assert abs(float(alpha.detach().mean()) - 0.5) < 0.01
    assert 0.005 < float(alpha.detach().std()) < 0.015
    plain = [torch.optim.SGD([weight], 0.1, momentum=0.9), torch.optim.Adam([alpha], 0.2)]
    closed = 0
    for step in range(12):
        inputs, target = torch.randn(8, 10), torch.randn(8, 6)
        u = torch.rand(6, 10, generator=folded_generator(0, "gates", step, "weight"))
        s = ((u.log() - (1 - u).log() + alpha) / (2 / 3)).sigmoid()
        z = (s * 1.2 - 0.1).clamp(0, 1)
        torch.testing.assert_close(model.weight.detach(), (weight * z).detach(), rtol=1e-4, atol=1e-6)
        closed += int((z == 0).sum())

        for o in plain:
            o.zero_grad()
        open_ = (alpha - 2 / 3 * math.log(0.1 / 1.1)).sigmoid()
        loss = (inputs @ (weight * z).T - target).square().mean() + 0.5 * open_.mean()
        loss.backward()
        for o in plain:
            o.step()
        with torch.no_grad():
            density = float((alpha - 2 / 3 * math.log(0.1 / 1.1)).sigmoid().mean())
            alpha.sub_(pressure(density, (step + 1) / 12, 0.3, 12))

        optimizer.zero_grad()
        (model(inputs) - target).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        latent = sparsifier.state_dict()["latent"]
        torch.testing.assert_close(latent["weight"], weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(latent["weight/gate"], alpha.detach(), rtol=1e-4, atol=1e-4)
    assert closed > 20

    model.eval()
    model(torch.randn(8, 10)).square().mean().backward()
    fixed = (weight * (alpha.sigmoid() * 1.2 - 0.1).clamp(0, 1)).detach()
    torch.testing.assert_close(model.weight.detach(), fixed, rtol=1e-3, atol=1e-5)
    sparsifier.before_step()
    mask = sparsifier.masks["weight"]
    assert sorted(alpha.detach().flatten().topk(18).indices.tolist()) == mask.flatten().nonzero().squeeze(1).tolist()
    torch.testing.assert_close(model.weight.detach(), fixed * mask, rtol=1e-3, atol=1e-5)
