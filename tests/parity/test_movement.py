"""Movement pruning by its definition (Sanh et al. 2020, https://arxiv.org/abs/2005.07683, equations 2 to 4), by autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dst
from dst import methods
from dst.relaxations import pressure


class Straight(torch.autograd.Function):
    """The mask of the scores forward, the identity backward."""

    @staticmethod
    def forward(ctx, scores, keep):
        return keep(scores)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def top(scores, count):
    mask = torch.zeros(scores.numel())
    mask[scores.flatten().topk(count).indices] = 1
    return mask.view_as(scores)


# 60 · (0.3 + 0.7 · (1 - k / 16)³) active weights k steps into the schedule, rounded up: 60, 52.61, 46.14, 40.53, …, 18.01.
CUBIC = (60, 53, 47, 41, 36, 32, 29, 26, 24, 22, 21, 20, 19, 19, 19, 19)


@pytest.mark.parametrize("soft", [False, True])
def test_movement(soft):
    torch.manual_seed(0)
    model = nn.Linear(10, 6, bias=False)
    weight = nn.Parameter(model.weight.detach().clone())
    scores = nn.Parameter(torch.zeros(6, 10))
    plain = [torch.optim.SGD([weight], 0.1, momentum=0.9), torch.optim.Adam([scores], 0.1)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    its_own = {"penalty": 0.7, "threshold": 0.4} if soft else {"start": 4}
    method = methods.movement(0.3, soft=soft, stop=20, learning_rate=0.1, **its_own)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=30)
    seen = set()
    for step in range(20):
        if soft:

            def keep(s):
                return (s.sigmoid() > 0.4).float()
        else:  # chosen after the step before, by the cubic schedule's density there

            def keep(s, at=step - 1):
                return top(s, CUBIC[at - 4] if at >= 4 else 60)

        inputs, target = torch.randn(8, 10), torch.randn(8, 6)
        mask = keep(scores.detach())
        torch.testing.assert_close(model.weight.detach(), weight.detach() * mask)
        seen.add(tuple(mask.flatten().tolist()))

        for o in plain:
            o.zero_grad()
        loss = (inputs @ (weight * Straight.apply(scores, keep)).T - target).square().mean()
        (loss + (0.7 * scores.sigmoid().mean() if soft else 0)).backward()
        for o in plain:
            o.step()
        if soft:
            with torch.no_grad():
                density = float((scores.sigmoid() > 0.4).float().mean())
                scores.sub_(pressure(density, (step + 1) / 20, 0.3, 20))

        optimizer.zero_grad()
        (model(inputs) - target).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        latent = sparsifier.state_dict()["latent"]
        torch.testing.assert_close(latent["weight"], weight.detach())
        torch.testing.assert_close(latent["weight/score"], scores.detach())
    assert len(seen) > 5
    if not soft:
        assert torch.equal(sparsifier.masks["weight"], top(scores.detach(), CUBIC[19 - 4]).bool())
        model(torch.randn(8, 10)).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        assert sparsifier.active == 18  # settled
        return
    expected = top(scores.detach(), 18).bool()
    model(torch.randn(8, 10)).square().mean().backward()
    sparsifier.before_step()
    assert torch.equal(sparsifier.masks["weight"], expected)
