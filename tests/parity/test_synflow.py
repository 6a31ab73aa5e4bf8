"""SynFlow (Tanaka et al. 2020, https://arxiv.org/abs/2006.05467): scores are sums over paths, layers' sums are equal, and
pruning is iterative on an exponential schedule (algorithm 1)."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import dst
from dst.allocation import ERK, PerLayer, Uniform
from dst.init import Synflow


def network(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*itertools.chain.from_iterable((layer, nn.ReLU()) for layer in layers[:-1]), layers[-1])


def path_sums(weights: list[Tensor]) -> list[Tensor]:
    """For every connection, the sum over all paths through it of the products of absolute weights, path by path."""
    weights = [w.detach().double().abs() for w in weights]
    sums = [torch.zeros_like(w) for w in weights]
    units = [range(weights[0].shape[1]), *(range(w.shape[0]) for w in weights)]
    for path in itertools.product(*units):
        product = 1.0
        for w, (a, b) in zip(weights, itertools.pairwise(path), strict=True):
            product *= float(w[b, a])
        for s, (a, b) in zip(sums, itertools.pairwise(path), strict=True):
            s[b, a] += product
    return sums


def algorithm(weights: list[Tensor], counts: list[int]) -> Tensor:
    """Algorithm 1 on path sums, over the whole network, with so many weights left by each iteration; True where kept."""
    masks = [torch.ones_like(w) for w in weights]
    total = sum(w.numel() for w in weights)
    for count in counts:
        flat = torch.cat([s.flatten() for s in path_sums([w * m for w, m in zip(weights, masks, strict=True)])])
        kept = torch.zeros(total, dtype=torch.bool)
        kept[flat.argsort(descending=True)[:count]] = True
        masks = [m.view_as(w).float() for m, w in zip(kept.split([w.numel() for w in weights]), weights, strict=True)]
    return kept


def train_once(model: nn.Module, method: dst.Method, inputs: Tensor | None = None) -> dst.Sparsifier:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=10)
    first = next(model.parameters())
    inputs = torch.randn(5, first.shape[1], dtype=first.dtype) if inputs is None else inputs
    model(inputs).square().mean().backward()
    sparsifier.before_step()
    optimizer.step()
    return sparsifier


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The scores of every network that is scored while the test runs."""
    scores: list[list[Tensor]] = []
    original = Synflow.call_scores

    def call(self: Synflow, *args: object) -> list[Tensor]:
        scores.append(original(self, *args))  # type: ignore[arg-type]
        return scores[-1]

    monkeypatch.setattr(Synflow, "call_scores", call)
    return scores


def test_two_linear_layers_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """[[1, -2], [3, 0]] and [[2, -1]]: paths of 2 and 4 through the first hidden unit, of 3 and 0 through the second."""
    scores = recorded(monkeypatch)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
        model[1].weight.copy_(torch.tensor([[2.0, -1.0]]))
    sparsifier = train_once(model, dst.methods.synflow(0.5, iterations=1))
    first, second = scores[0]
    assert torch.equal(first * 6, torch.tensor([[2.0, 4.0], [3.0, 0.0]], dtype=torch.float64))
    assert torch.equal(second * 6, torch.tensor([[6.0, 3.0]], dtype=torch.float64))
    assert sparsifier.active == 3
    assert sparsifier.masks["1.weight"][0, 0]
    assert sparsifier.masks["0.weight"][0, 1]


def test_scores_are_path_sums_and_layers_sums_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = recorded(monkeypatch)
    model = network(3, 4, 5, 2)
    expected = path_sums(list(model.parameters()))
    train_once(model, dst.methods.synflow(0.5, iterations=1))
    largest = max(s.max() for s in expected)
    for found, sums in zip(scores[0], expected, strict=True):
        torch.testing.assert_close(found * largest, sums, rtol=1e-12, atol=0)
    totals = torch.stack([s.sum() for s in scores[0]])
    torch.testing.assert_close(totals, totals[:1].expand(3), rtol=1e-12, atol=0)  # the conservation law


@pytest.mark.parametrize(
    ("density", "counts"),
    [
        (0.5, [30]),
        (0.3, [45, 33, 25, 18]),  # 60 · 0.3^(k / 4) = 44.4, 32.9, 24.3, 18
        (0.2, [48, 38, 31, 24, 20, 16, 12]),  # 60 · 0.2^(k / 7) = 47.7, 37.9, 30.1, 23.9, 19.01, 15.1, 12
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_mask_is_that_of_algorithm_1(density: float, counts: list[int], seed: int) -> None:
    model = network(4, 5, 5, 3, seed=seed)
    expected = algorithm([p.detach().clone() for p in model.parameters()], counts)
    sparsifier = train_once(model, dst.methods.synflow(density, iterations=len(counts)))
    assert torch.equal(torch.cat([m.flatten() for m in sparsifier.masks.values()]), expected)


def test_many_iterations_keep_paths_where_one_cuts_them() -> None:
    """The paper's claim: a layer with many weights, whose scores are therefore small, does not collapse."""

    def connected(iterations: int) -> float:
        model = network(6, 60, 60, 3, seed=1)
        train_once(model, dst.methods.synflow(0.01, iterations=iterations))
        values = torch.ones(6)
        for weight in model.parameters():
            values = weight.detach().abs() @ values
        return float(values.sum())

    assert connected(100) > 0
    assert connected(100) > connected(1)


@pytest.mark.parametrize("allocation", [Uniform(), ERK(), PerLayer({"0.weight": 0.25, "*": 0.5})])
def test_every_allocation_is_used_on_the_way_and_in_the_end(allocation: dst.types.Allocation) -> None:
    model = network(8, 8, 8)
    density = 0.375
    sparsifier = train_once(model, dst.methods.synflow(density, iterations=6, allocation=allocation))
    counts = allocation.counts(["0.weight", "2.weight"], [(8, 8), (8, 8)], density)
    assert [row["nonzero"] for row in sparsifier.layer_table()] == counts


def test_the_weights_of_the_step_are_the_initial_ones() -> None:
    model = network(8, 8, 8)
    before = [p.detach().clone() for p in model.parameters()]
    sparsifier = train_once(model, dst.methods.synflow(0.25))
    for p, old, mask in zip(model.parameters(), before, sparsifier.masks.values(), strict=True):
        assert torch.equal(p.detach(), old * mask)
