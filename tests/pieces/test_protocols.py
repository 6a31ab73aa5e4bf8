"""Pieces of users' own: members as properties or class attributes, capabilities declared and not inherited by accident."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import dst
from dst import init, methods, scores
from dst.types import ActiveScore, AfterDropScore, LayerView, Sampler, Score, as_sampler


@dataclass(frozen=True)
class Written:
    """abs(gradient), with all members as properties."""

    power: float = 1.0

    @property
    def needs_gradient(self) -> bool:
        return True

    @property
    def observes(self) -> bool:
        return False

    def __call__(self, view: LayerView) -> Tensor:
        assert view.gradient is not None
        return view.gradient.abs() ** self.power


@dataclass(frozen=True)
class OnlyActive(scores.Magnitude):
    """A drop score that says itself whether it needs inactive weights."""

    alone: bool = True

    @property
    def active_only(self) -> bool:  # type: ignore[override]
        return self.alone


@dataclass(frozen=True)
class First:
    """An init with properties, which takes the first positions."""

    @property
    def needs_gradient(self) -> bool:
        return False

    def scores(self, view: LayerView) -> Tensor:
        return -torch.arange(view.weight.numel(), dtype=torch.float32).view(view.weight.shape)


@dataclass(frozen=True)
class Even:
    """An allocation with a property."""

    @property
    def needs_scores(self) -> bool:
        return False

    def counts(self, names, shapes, density, scores=None):
        return [round(density * torch.Size(shape).numel()) for shape in shapes]


def test_members_may_be_properties():
    model = nn.Linear(4, 4)
    method = methods.rigl(0.5, grow=Written(), init=First(), allocation=Even(), update_every=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=4)
    assert sparsifier.masks["weight"].flatten().tolist() == [True] * 8 + [False] * 8
    model(torch.randn(2, 4)).square().sum().backward()
    sparsifier.before_step()
    optimizer.step()
    assert sparsifier.updates == 1
    assert int(sparsifier.masks["weight"].sum()) == 8
    assert method.spec()["grow"] == {"_target_": f"{__name__}.Written", "power": 1.0}


def test_a_property_decides_for_each_instance():
    assert methods.rigl(0.1, drop=OnlyActive(), backend="csr").backend == "csr"
    with pytest.raises(dst.ConfigurationError, match="OnlyActive is no drop score"):
        methods.rigl(0.1, drop=OnlyActive(alone=False), backend="csr")


def test_members_of_a_class_are_no_settings():
    assert methods.rigl(0.1).spec()["drop"] == {"_target_": "dst.scores.Magnitude"}
    assert methods.rigl(0.1).spec()["init"] == {"_target_": "dst.init.Random"}
    assert methods.cht(0.1, temperature=0.5).spec()["grow"] == {
        "_target_": "dst.scores.Soft",
        "score": {"_target_": "dst.scores.CH3L3"},
        "temperature": 0.5,
    }


def test_capabilities_are_declared():
    assert isinstance(scores.Magnitude(), ActiveScore)
    assert isinstance(scores.CH3L3(), AfterDropScore)
    assert not isinstance(Written(), (ActiveScore, AfterDropScore))
    assert isinstance(Written(), Score)
    assert [scores.Soft(s).after_drop for s in (scores.CH3L3(), scores.Magnitude())] == [True, False]


class Drawing:
    """Samples without inheriting from ``Sampler``."""

    needs_gradient = observes = False

    def __call__(self, view: LayerView) -> Tensor:
        return view.weight

    def sample(self, size: int, excluded: Tensor, count: int, generator: torch.Generator) -> Tensor:
        return torch.arange(count)


class Scored(scores.Random):
    """Scores: its ``__call__`` is not the draw that ``sample`` makes."""

    def __call__(self, view: LayerView) -> Tensor:
        return view.weight


class Renamed(scores.Random):
    """Samples as its base does."""


class Both(Scored):
    """Scores and samples in ways of its own."""

    def sample(self, size: int, excluded: Tensor, count: int, generator: torch.Generator) -> Tensor:
        return torch.arange(count)


class ScoredInit(init.Random):
    """Scores."""

    def scores(self, view: LayerView) -> Tensor:
        return view.weight


class ScoredDraw(Drawing, Sampler):
    """Inherits from ``Sampler`` and overrides the score alone."""

    def __call__(self, view: LayerView) -> Tensor:
        return -view.weight


@pytest.mark.parametrize(
    "piece",
    [scores.Random(), init.Random(), Drawing(), Renamed(), Both()],
    ids=lambda piece: f"{type(piece).__module__.rpartition(chr(46))[2]}.{type(piece).__name__}",
)
def test_pieces_that_sample(piece):
    assert as_sampler(piece) is piece


@pytest.mark.parametrize(
    "piece",
    [scores.Magnitude(), init.Magnitude(), Scored(), type("Deeper", (Scored,), {})(), ScoredInit(), ScoredDraw()],
)
def test_pieces_that_score(piece):
    assert as_sampler(piece) is None


def test_inits_and_scores_share_their_ranks():
    weight = torch.tensor([[1.0, -3.0], [0.5, 2.0]])

    def view() -> LayerView:
        return LayerView(weight, weight > 0, None, None, torch.Generator().manual_seed(3), weight + 1)

    for a, b in (
        (init.Random, scores.Random),
        (init.Magnitude, scores.Magnitude),
        (init.Importance, scores.Importance),
    ):
        assert torch.equal(a().scores(view()), b()(view()))
