"""SR-STE by its definition (Zhou et al. 2021, https://arxiv.org/abs/2102.04010, equation 9): g + λ · (1 − m) ⊙ w, λ = 2e-4."""

from __future__ import annotations

import torch
from torch import nn

import dst
from dst import methods


def test_the_published_coefficient():
    assert methods.sr_ste().relaxation.inactive_decay == 2e-4


def test_sr_ste_under_momentum():
    torch.manual_seed(0)
    model = nn.Linear(10, 6, bias=False)
    latent = nn.Parameter(model.weight.detach().clone())
    plain = torch.optim.SGD([latent], 0.1, momentum=0.9)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sparsifier = dst.Sparsifier(model, optimizer, methods.sr_ste(0.2, decay=0.3), total_steps=20)
    seen = set()
    for _ in range(20):
        inputs, target = torch.randn(8, 10), torch.randn(8, 6)
        mask = torch.zeros(12, 5)  # 1:5, since the density is 0.2
        mask.scatter_(1, latent.detach().abs().view(12, 5).argmax(1, keepdim=True), 1)
        mask = mask.view(6, 10)
        seen.add(tuple(mask.flatten().tolist()))
        torch.testing.assert_close(model.weight.detach(), latent.detach() * mask)

        sparse = (latent.detach() * mask).requires_grad_()
        (inputs @ sparse.T - target).square().mean().backward()
        latent.grad = sparse.grad + 0.3 * (1 - mask) * latent.detach()
        plain.step()

        optimizer.zero_grad()
        (model(inputs) - target).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        torch.testing.assert_close(sparsifier.state_dict()["latent"]["weight"], latent.detach())
    assert len(seen) > 5
