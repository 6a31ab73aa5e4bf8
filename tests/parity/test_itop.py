"""The ITOP rate of Liu et al. 2021 (https://arxiv.org/abs/2102.02887), section 3: abs(union of all masks so far) over the number of
weights; dense layers are in neither term."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dst
from dst import methods
from dst.allocation import PerLayer
from dst.schedules import Constant
from dst.scores import Magnitude
from dst.types import LayerView


@dataclass(frozen=True)
class Position(Magnitude):
    """The first positions score highest: what is active becomes predictable."""

    def __call__(self, view: LayerView) -> Tensor:
        return -torch.arange(float(view.weight.numel())).view(view.weight.shape)


@dataclass(frozen=True)
class LastPosition(Magnitude):
    def __call__(self, view: LayerView) -> Tensor:
        return torch.arange(float(view.weight.numel())).view(view.weight.shape)


@dataclass(frozen=True)
class FirstMask:
    needs_gradient = False

    def scores(self, view: LayerView) -> Tensor:
        return Position()(view)


def test_by_hand():
    """Ten weights, four active; every update drops the lowest position but keeps the mask's size, growing the highest."""
    model = nn.Sequential(nn.Linear(10, 1, bias=False), nn.Linear(3, 5, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = methods.set_(
        (4 + 15) / 25,
        allocation=PerLayer({"0.weight": 0.4, "1.weight": 1.0}),
        init=FirstMask(),
        drop=Position(),
        grow=LastPosition(),
        fraction=Constant(0.25),
        regrow_dropped=False,
        update_every=1,
    )
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=100)
    assert sparsifier.masks["0.weight"].nonzero()[:, 1].tolist() == [0, 1, 2, 3]
    assert sparsifier.exploration_rate == 4 / 10  # the dense layer is in neither term
    rates, active = [], []
    for _ in range(3):
        sparsifier.before_step()
        optimizer.step()
        rates.append(sparsifier.exploration_rate)
        active.append(sparsifier.masks["0.weight"].nonzero()[:, 1].tolist())
    # 3 gives way to 9, then 9 to 8, then 8 to 9: the last adds nothing new.
    assert active == [[0, 1, 2, 9], [0, 1, 2, 8], [0, 1, 2, 9]]
    assert rates == [5 / 10, 6 / 10, 6 / 10]


def test_the_rate_is_the_union_of_all_masks():
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = dst.Sparsifier(model, optimizer, methods.set_(0.2, update_every=2), total_steps=20)
    union = dict(sparsifier.masks)
    for _ in range(15):
        sparsifier.before_step()
        optimizer.step()
        union = {name: union[name] | mask for name, mask in sparsifier.masks.items()}
    assert sparsifier.masks["2.weight"].all()
    sparse = ["0.weight", "1.weight"]
    expected = sum(int(union[n].sum()) for n in sparse) / sum(union[n].numel() for n in sparse)
    assert sparsifier.exploration_rate == expected > sparsifier.density


def test_fixed_masks_explore_what_they_hold():
    for method, expected in ((methods.sparse_from_scratch(0.2), 0.2), (methods.dense(), 1)):
        model = nn.Linear(30, 20)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        assert dst.Sparsifier(model, optimizer, method, total_steps=2).exploration_rate == expected
