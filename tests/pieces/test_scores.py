"""Scores and first masks."""

from __future__ import annotations

import math

import pytest
import torch

from dst import init, scores
from dst.errors import ConfigurationError
from dst.topology.seeding import folded_generator
from dst.types import LayerView, Score


def view(weight=None, mask=None, gradient=None, buffer=None, seed=0):
    weight = torch.zeros(2, 4) if weight is None else torch.tensor(weight)
    return LayerView(
        weight=weight,
        mask=torch.ones_like(weight, dtype=torch.bool) if mask is None else torch.tensor(mask).bool(),
        gradient=None if gradient is None else torch.tensor(gradient),
        buffer=None if buffer is None else torch.tensor(buffer),
        generator=torch.Generator().manual_seed(seed),
    )


def seen(gradient):
    return LayerView(torch.zeros_like(gradient), torch.ones_like(gradient).bool(), gradient, None, torch.Generator())


def test_magnitude_and_gradient():
    assert scores.Magnitude()(view(weight=[[-2.0, 1.0]])).tolist() == [[2.0, 1.0]]
    assert scores.Gradient()(view(gradient=[[-2.0, 1.0]])).tolist() == [[2.0, 1.0]]


def test_signed_magnitude_ranks_each_sign_by_itself():
    weight = [[0.1, -5.0, 0.2, -6.0, 0.3, 0.0, 9.0, 0.4]]
    mask = [[1, 1, 1, 1, 1, 1, 0, 1]]
    expected = [1 / 4, 1 / 2, 2 / 4, 2 / 2, 3 / 4, -1, 0, 4 / 4]  # an active zero is dropped first; 9.0 is inactive
    assert scores.SignedMagnitude()(view(weight=weight, mask=mask)).tolist() == [pytest.approx(expected)]


def test_dropping_by_signed_magnitude_takes_the_same_share_of_both_signs():
    weight = torch.cat([torch.rand(40) + 10, -torch.rand(20)])  # by magnitude alone, only negatives would go
    lowest = scores.SignedMagnitude()(view(weight=weight.tolist())).argsort()[:15]
    assert int((weight[lowest] > 0).sum()) == 10
    assert int((weight[lowest] < 0).sum()) == 5


def test_momentum_is_a_mean_of_dense_gradients():
    score = scores.Momentum(beta=0.75)
    buffer = score.observe(None, seen(torch.tensor([4.0, -8.0])))
    assert buffer.tolist() == [1.0, -2.0]
    buffer = score.observe(buffer, seen(torch.tensor([0.0, 8.0])))
    assert buffer.tolist() == [0.75, 0.5]
    assert score(view(weight=[1.0, 1.0], buffer=[-1.0, 2.0])).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("dtype", "kept"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_momentum_is_kept_in_float32_or_wider(dtype, kept):
    gradient = torch.ones(3, dtype=dtype)
    buffer = scores.Momentum().observe(None, seen(gradient))
    assert buffer.dtype == kept
    assert scores.Momentum().observe(buffer, seen(gradient)).dtype == kept
    assert gradient.tolist() == [1, 1, 1]


@pytest.mark.parametrize("beta", [-0.1, 1.0, math.nan])
def test_momentum_refuses_a_decay_out_of_range(beta):
    with pytest.raises(ConfigurationError, match="beta"):
        scores.Momentum(beta)


def test_random_follows_the_generator():
    first, same, other = (scores.Random()(view(seed=s)) for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.shape == (2, 4)
    assert 0 <= first.min() < first.max() < 1


@pytest.mark.parametrize(
    ("score", "gradient", "observes"),
    [
        (scores.Magnitude(), False, False),
        (scores.SignedMagnitude(), False, False),
        (scores.Random(), False, False),
        (scores.Gradient(), True, False),
        (scores.Momentum(), True, True),
    ],
)
def test_what_scores_ask_for(score, gradient, observes):
    assert isinstance(score, Score)
    assert (score.needs_gradient, score.observes) == (gradient, observes)
    if not observes:
        with pytest.raises(TypeError, match=type(score).__name__):
            score.observe(None, seen(torch.ones(1)))


def test_inits():
    seen = view(weight=[[1.0, -3.0]], gradient=[[-4.0, 1.0]], seed=5)
    assert init.Magnitude().scores(seen).tolist() == [[1.0, 3.0]]
    assert init.Snip().scores(seen).tolist() == [[4.0, 3.0]]
    assert torch.equal(init.Random().scores(seen), torch.rand(1, 2, generator=torch.Generator().manual_seed(5)))
    assert [i.needs_gradient for i in (init.Magnitude(), init.Random(), init.Snip(), init.FromFile("x"))] == [
        False,
        False,
        True,
        False,
    ]
    with pytest.raises(TypeError, match="file"):
        init.FromFile("x").scores(seen)


def test_folded_generators_depend_on_every_key_and_on_nothing_else():
    def draw(*keys):
        torch.manual_seed(len(keys))
        return tuple(torch.rand(2, generator=folded_generator(*keys)).tolist())

    assert draw(0, "grow", 5, "a") == draw(0, "grow", 5, "a")
    different = {draw(0, "grow", 5, "a"), draw(1, "grow", 5, "a"), draw(0, "drop", 5, "a"), draw(0, "grow", 6, "a")}
    assert len(different | {draw(0, "grow", 5, "b"), draw(0, "grow", "5", "a")}) == 6
    assert draw(0) != torch.rand(2).tolist()
