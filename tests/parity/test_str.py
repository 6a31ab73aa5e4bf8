"""STR by its definition (Kusupati et al. 2020, https://arxiv.org/abs/2002.03231, equations 4 to 7), by autograd."""

from __future__ import annotations

import torch
from torch import nn

import dst
from dst import methods
from dst.relaxations import pressure


def test_str():
    torch.manual_seed(0)
    model = nn.Linear(10, 6, bias=False)
    weight = nn.Parameter(model.weight.detach().clone())
    threshold = nn.Parameter(torch.tensor(-2.0))
    plain = torch.optim.SGD(
        [{"params": [weight], "momentum": 0.9, "weight_decay": 0.01}, {"params": [threshold], "weight_decay": 0.02}],
        0.3,
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9, weight_decay=0.01)
    method = methods.str_(0.3, stop=12, initial=-2.0, decay=0.02)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=16)

    def effective():
        return weight.sign() * (weight.abs() - threshold.sigmoid()).relu()

    for step in range(12):
        inputs, target = torch.randn(8, 10), torch.randn(8, 6)
        torch.testing.assert_close(model.weight.detach(), effective().detach())
        assert 0 < int((model.weight != 0).sum()) < 60

        plain.zero_grad()
        (inputs @ effective().T - target).square().mean().backward()
        plain.step()
        with torch.no_grad():
            density = float((weight.abs() > threshold.sigmoid()).float().mean())
            threshold.add_(pressure(density, (step + 1) / 12, 0.3, 12))

        optimizer.zero_grad()
        (model(inputs) - target).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        latent = sparsifier.state_dict()["latent"]
        torch.testing.assert_close(latent["weight"], weight.detach())
        torch.testing.assert_close(latent["weight/threshold"], threshold.detach())

    last = (weight.abs() - threshold.sigmoid()).detach().flatten()
    (model(torch.randn(8, 10))).square().mean().backward()
    sparsifier.before_step()
    assert sorted(last.topk(18).indices.tolist()) == sparsifier.masks["weight"].flatten().nonzero().squeeze(1).tolist()
