"""Cannistraci-Hebb training: CH3-L3 by enumeration of paths, chain removal, soft sampling.

CH3-L3 in the form for nodes (Zhang et al. 2025, https://arxiv.org/abs/2501.19107; ``CH3_L3n`` in the authors' code,
github.com/biomedical-cybernetics): the authors' matrix formula is B = (A Aᵀ != 0), e = (deg - A Aᵀ) · B with zeros set to one, then
minus one, M = B / (e + 1), score = M A + (M' Aᵀ)ᵀ. Here it is summed path by path.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dst
from dst import methods
from dst.allocation import Uniform
from dst.engine.update import layer_facts
from dst.errors import ConfigurationError
from dst.planning.update import Moment, plan_update
from dst.schedules import Constant
from dst.scores import CH3L3, Gradient, Magnitude, Soft
from dst.topology.chains import incomplete
from dst.types import LayerView


def view(mask, weight=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LayerView(mask.float() if weight is None else weight, mask, None, None, generator)


def by_enumeration(mask):
    """For every (u, v): over nodes r that link to v and share a neighbour with u, 1 / external links of r; both ways."""
    rows, columns = mask.shape
    of_row = [set(mask[r].nonzero().flatten().tolist()) for r in range(rows)]
    of_column = [set(mask[:, c].nonzero().flatten().tolist()) for c in range(columns)]
    scores = torch.zeros(rows, columns)
    for u in range(rows):
        for v in range(columns):
            for r in of_column[v]:
                if of_row[u] & of_row[r]:
                    scores[u, v] += 1 / max(1, len(of_row[r] - of_row[u]))
            for c in of_row[u]:
                if of_column[v] & of_column[c]:
                    scores[u, v] += 1 / max(1, len(of_column[c] - of_column[v]))
    return scores


@pytest.mark.parametrize(("rows", "columns", "density"), [(6, 9, 0.3), (9, 5, 0.5), (8, 8, 0.1), (4, 4, 1.0)])
def test_ch3_l3(rows, columns, density):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)) < density
    mask[0, 0] = True
    torch.testing.assert_close(CH3L3()(view(mask)), by_enumeration(mask))


def test_ch3_l3_by_hand():
    # u0 - {a, b}, u1 - {b, c}: the path u0-b-u1-c predicts (u0, c), and (u1, a) alike.
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    scores = CH3L3()(view(mask))
    # over u1: external of u1 is 1; over b: external of b is 1. Each gives 1.
    assert (float(scores[0, 2]), float(scores[1, 0])) == (2.0, 2.0)


def test_a_convolution_is_the_matrix_of_outputs_by_kernel_positions():
    mask = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(1)) < 0.4
    torch.testing.assert_close(CH3L3()(view(mask)).flatten(1), by_enumeration(mask.flatten(1)))


def test_an_update_grows_what_the_topology_after_the_drop_predicts():
    torch.manual_seed(2)
    model = nn.Linear(12, 10, bias=False)
    method = methods.cht(0.4, update_every=1, allocation=Uniform(), fraction=Constant(0.25))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=10)
    mask, weight = sparsifier.masks["weight"], model.weight.detach().clone()
    kept = torch.zeros(120, dtype=torch.bool)
    kept[weight.abs().flatten().topk(48 - 12).indices] = True
    scores = by_enumeration(kept.view(10, 12)).flatten().masked_fill(kept, -1)
    model.weight.grad = torch.zeros(10, 12)
    sparsifier.before_step()
    optimizer.step()
    after = sparsifier.masks["weight"].flatten()
    assert int(after.sum()) == int(mask.sum()) == 48
    assert after[kept].all()
    grown = after & ~kept
    threshold = scores.topk(12).values.min()
    assert grown[scores > threshold + 1e-4].all()
    assert (scores[grown] >= threshold - 1e-4).all()
    assert sparsifier.step_counts["dense_gradient"] == 0


def test_soft_sampling_is_proportional_to_the_score():
    mask = torch.ones(1, 4, dtype=torch.bool)
    weight = torch.tensor([[1.0, 2.0, 0.0, -5.0]])
    counts = torch.zeros(4)
    for seed in range(2000):
        counts[Soft(Magnitude(), 1.0)(view(mask, weight, seed)).argmax()] += 1
    assert counts[2] == 0
    # expected 250, 500, 1250 with standard deviations of at most 23
    assert counts.tolist() == pytest.approx([250, 500, 0, 1250], abs=100)
    sharp = [int(Soft(Magnitude(), 0.05)(view(mask, weight, seed)).argmax()) for seed in range(50)]
    assert set(sharp) == {3}
    flat = [int(Soft(Magnitude(), 1e3)(view(mask, weight, seed)).argmax()) for seed in range(100)]
    assert set(flat) == {0, 1, 3}  # almost uniform, but what has no score has no chance
    with pytest.raises(ConfigurationError, match="not by Gradient"):
        Soft(Gradient())
    with pytest.raises(ConfigurationError, match="temperature=0 must be positive"):
        Soft(Magnitude(), 0)


def test_settings():
    assert (methods.cht(0.1).drop, methods.cht(0.1).grow) == (Magnitude(), CH3L3())
    soft = methods.cht(0.1, temperature=0.5)
    assert (soft.drop, soft.grow) == (Soft(Magnitude(), 0.5), Soft(CH3L3(), 0.5))
    with pytest.raises(ConfigurationError, match="by gradient or at random, not by CH3L3"):
        methods.cht(0.1, backend="csr", chain_removal=False)


def test_chain_removal():
    first = torch.tensor([[1, 0], [0, 1], [0, 0]]).bool()  # three neurons, the last without inputs
    second = torch.tensor([[1, 0, 1], [0, 0, 1]]).bool()  # the second neuron leads nowhere
    third = torch.tensor([[1, 1]]).bool()
    removed = incomplete([first, second, third])
    assert [g.nonzero().tolist() for g in removed] == [[[1, 1]], [[0, 2], [1, 2]], [[0, 1]]]
    left = [m & ~g for m, g in zip((first, second, third), removed, strict=True)]
    paths = [float((c.double() @ b.double() @ a.double()).sum()) for a, b, c in (left, (first, second, third))]
    assert paths == [1.0, 1.0]
    assert not any(g.any() for g in incomplete(left))


@pytest.mark.parametrize("chain_removal", [True, False])
def test_what_an_update_drops(chain_removal):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 5, bias=False))
    method = methods.cht(0.15, update_every=1, allocation=Uniform(), chain_removal=chain_removal)
    sparsifier = dst.Sparsifier(model, torch.optim.SGD(model.parameters(), 0.1), method, total_steps=10)
    masks = sparsifier.masks
    assert [int(mask.sum()) for mask in masks.values()] == [8, 6]
    plain = (2, 1)  # three tenths are 2.4 and 1.8
    kept = []
    for parameter, mask in zip(model.parameters(), masks.values(), strict=True):
        count = int(mask.sum()) - plain[len(kept)]
        largest = torch.zeros(mask.numel(), dtype=torch.bool)
        largest[parameter.detach().abs().flatten().topk(count).indices] = True
        kept.append(largest.view_as(mask))
        parameter.grad = torch.zeros_like(parameter)
    broken = incomplete(kept)
    assert sum(int(b.sum()) for b in broken) > 0
    facts = layer_facts(sparsifier._training, 0)
    plan = plan_update(method, Moment(0, 0, 0.15, 0.3), facts, range(len(facts)), method.scores())
    updates = {update.layer.label: update for update in plan.layers}
    for name, number, b in zip(masks, plain, broken, strict=True):
        assert updates[name].drop == number + (int(b.sum()) if chain_removal else 0)
    sparsifier.before_step()
    for name, mask in sparsifier.masks.items():
        assert int(mask.sum()) == int(masks[name].sum())
