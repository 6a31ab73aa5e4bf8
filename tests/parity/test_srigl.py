"""SRigL's update (Lasby et al. 2024, https://arxiv.org/abs/2305.02299, section 3), computed neuron by neuron.

As in the authors' code (github.com/calgaryml/condensed-sparsity): keep the largest weights of the layer, count each neuron's
salient weights, ablate neurons below γ_sal · fan-in, and let every other neuron grow by gradient to the new fan-in.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dst
from dst import methods
from dst.allocation import Uniform
from dst.patterns import FanIn
from dst.schedules import Constant


def srigl_step(weight, gradient, mask, ablate, budget):
    """The new mask, row by row, where two fifths of the active weights are dropped."""
    rows, columns = mask.shape
    drop = 2 * int(mask.sum()) // 5
    order = sorted(mask.nonzero().tolist(), key=lambda p: abs(float(weight[p[0], p[1]])))
    kept = {tuple(p) for p in order[drop:]}
    free = [(r, c) for r in range(rows) for c in range(columns) if (r, c) not in kept]
    best = sorted(free, key=lambda p: -abs(float(gradient[p])))
    salient = kept | set(best[: budget - len(kept)])
    fan_in = budget / int(mask.any(1).sum())
    counts = [sum(p[0] == r for p in salient) for r in range(rows)]
    remaining = [r for r in range(rows) if ablate == 0 or counts[r] >= max(1, ablate * fan_in)]
    remaining = remaining or [counts.index(max(counts))]
    new_fan_in = min(columns, budget // len(remaining))
    new = torch.zeros_like(mask)
    for r in remaining:
        mine = sorted((p for p in kept if p[0] == r), key=lambda p: -abs(float(weight[p])))[:new_fan_in]
        mine += [p for p in best if p[0] == r][: new_fan_in - len(mine)]
        for p in mine:
            new[p] = True
    return new


@pytest.mark.parametrize(("ablate", "removes"), [(0.0, False), (0.3, True), (0.8, True)])
def test_updates(ablate, removes):
    torch.manual_seed(3)
    model = nn.Linear(12, 10)
    method = methods.srigl(0.25, update_every=1, allocation=Uniform(), pattern=FanIn(ablate), fraction=Constant(0.4))
    sparsifier = dst.Sparsifier(model, torch.optim.SGD(model.parameters(), 0.0), method, total_steps=20)
    assert sparsifier.masks["weight"].sum(1).tolist() == [3] * 10
    scale = torch.logspace(-3, 1, 10)[:, None]  # some neurons matter less than others
    ablated = False
    for _ in range(5):
        gradient = torch.randn(10, 12) * scale
        with torch.no_grad():
            model.weight.copy_(torch.randn(10, 12) * scale * sparsifier.masks["weight"])
        model.weight.grad, model.bias.grad = gradient.clone(), torch.zeros(10)
        expected = srigl_step(model.weight.detach(), gradient, sparsifier.masks["weight"], ablate, 30)
        sparsifier.before_step()
        sparsifier._training.steppers[0].optimizer.step()
        assert torch.equal(sparsifier.masks["weight"], expected)
        remaining = sparsifier.masks["weight"].sum(1)
        assert len(remaining[remaining > 0].unique()) == 1
        ablated |= bool((remaining == 0).any())
    assert ablated == removes


def test_published_settings():
    method = methods.srigl(0.1)
    assert (method.pattern, method.fraction.initial, method.clock.every) == (FanIn(0.3), 0.3, 100)
