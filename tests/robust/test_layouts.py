"""Weights that are not contiguous, share memory, or are empty."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import dst
from tests.methods_list import METHODS
from tests.sampling import rotated
from tests.small import OPTIMIZERS, Small, train


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with dimensions in memory the other way round."""
    order = list(reversed(range(tensor.ndim)))
    return tensor.permute(order).contiguous().permute(order)


@pytest.mark.parametrize(("name", "optimizer"), rotated(METHODS, ["sgd", "odd"], share=(0, 3)))
def test_non_contiguous_weights_train_like_contiguous_ones(name: str, optimizer: str) -> None:
    def run(transposed: bool) -> Any:
        torch.manual_seed(0)
        model = Small()
        if transposed:
            for module in (model.conv, model.hidden, model.head):
                module.weight = nn.Parameter(strided(module.weight.detach()))
            model.attention.in_proj_weight = nn.Parameter(strided(model.attention.in_proj_weight.detach()))
            assert not model.hidden.weight.is_contiguous()
        model = model.double()
        for parameter in model.parameters():
            # Gradients that are zero in exact arithmetic come out as rounding errors, which differ between layouts.
            parameter.register_hook(lambda gradient: gradient.mul(2.0**40).round().mul(2.0**-40))
        made = OPTIMIZERS[optimizer](model.parameters())
        sparsifier = dst.Sparsifier(model, made, METHODS[name](), total_steps=24)
        train(model, made, sparsifier, 13)  # three updates of every four steps
        return model, sparsifier

    (model, sparsifier), (_, other) = run(True), run(False)
    assert not model.hidden.weight.is_contiguous()
    for n, mask in other.masks.items():
        assert torch.equal(sparsifier.masks[n], mask), n
        assert model.get_parameter(n)[~mask].eq(0).all()


def test_channels_last() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    sparsifier = dst.Sparsifier(model, optimizer, METHODS["rigl"](), total_steps=24)
    counts = [row["nonzero"] for row in sparsifier.layer_table()]
    for _ in range(24):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        for n, mask in sparsifier.masks.items():
            assert model.get_parameter(n)[~mask].eq(0).all()
    assert [int(m.sum()) for m in sparsifier.masks.values()] == counts


def test_a_weight_whose_entries_share_memory_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.randn(1, 4).expand(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(dst.ConfigurationError, match=r"1\.weight .*share memory.*contiguous\(\)"):
        dst.Sparsifier(model, optimizer, METHODS["rigl"](), total_steps=5)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("name", rotated(METHODS, share=(0, 2)))
def test_a_layer_without_weights_stays_out(name: str) -> None:
    class Sum(nn.ModuleDict):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self["none"](x[:, :0]) + self["some"](x)

    model = Sum({"none": nn.Linear(0, 5), "some": nn.Linear(8, 5)})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = dst.Sparsifier(model, optimizer, METHODS[name](), total_steps=24)
    assert set(sparsifier.masks) == {"some.weight"}
    assert "empty" in str(dst.plan(model, METHODS[name]()))
    for _ in range(24):
        optimizer.zero_grad()
        loss = model(torch.randn(2, 8)).square().mean()
        sparsifier.before_backward(loss)
        loss.backward()
        sparsifier.before_step()
        optimizer.step()
    assert sparsifier.step == 24


@pytest.mark.parametrize("name", rotated(METHODS, share=(1, 2)))
def test_a_layer_with_one_weight_among_others(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 1), nn.Linear(1, 12))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    sparsifier = dst.Sparsifier(model, optimizer, METHODS[name](), total_steps=24)
    for _ in range(24):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 6)).square().mean()
        sparsifier.before_backward(loss)
        loss.backward()
        sparsifier.before_step()
        optimizer.step()
    masks = sparsifier.masks
    assert masks["1.weight"].all()  # it is never left with none
    assert [int(m.sum()) for m in masks.values()] == [row["nonzero"] for row in sparsifier.layer_table()]


def test_a_dense_embedding_with_sparse_gradients_takes_no_part() -> None:
    """Its gradients are sparse tensors; they are checked for overflow too."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"words": nn.Embedding(10, 6, sparse=True), "head": nn.Linear(6, 10)})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = dst.Sparsifier(model, optimizer, dst.methods.rigl(0.3, update_every=2), total_steps=12)
    for step in range(12):
        optimizer.zero_grad()
        words = torch.randint(10, (8,))
        functional.cross_entropy(model["head"](model["words"](words)), words).backward()
        if step == 4:
            model["words"].weight.grad = model["words"].weight.grad * float("inf")
        sparsifier.before_step()
        if step == 4:
            assert sparsifier.skipped == 1
            optimizer.zero_grad()
        optimizer.step()
    assert sparsifier.updates == 4  # at 0, 2, 6 and 8


def test_an_embedding_made_sparse_with_sparse_gradients_is_refused_by_name() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(10, 6, sparse=True), "head": nn.Linear(6, 10)})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = dst.Sparsifier(model, optimizer, METHODS["rigl"](), total_steps=5, include=["words", "head"])
    model["head"](model["words"](torch.tensor([1]))).sum().backward()
    with pytest.raises(dst.ConfigurationError, match=r"words\.weight has a sparse gradient.*sparse=False"):
        sparsifier.before_step()
