"""Gradients, layers and models at the edge: a defined result, or an error that names the parameter."""

from __future__ import annotations

import warnings

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dst
from dst.errors import ConfigurationError
from dst.lightning import SparseTraining
from dst.schedules import Constant
from tests.methods_list import METHODS, NEEDS_CALL


def build(model, method, steps=20, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return optimizer, dst.Sparsifier(model, optimizer, method, total_steps=steps, **settings)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in NEEDS_CALL])
def test_gradients_of_zero_rewire_at_random_and_keep_counts(name):
    torch.manual_seed(0)
    model = nn.Linear(40, 30)
    optimizer, sparsifier = build(model, METHODS[name](), steps=24)
    for _ in range(24):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        sparsifier.before_step()
        optimizer.step()
    expected = round(1200 * METHODS[name]().density)
    assert sparsifier.active == int(sparsifier.masks["weight"].sum()) == expected


def test_connections_grown_without_a_gradient_are_spread_over_the_layer():
    """Taking the first of equals would fill the first rows."""
    torch.manual_seed(0)
    model = nn.Linear(100, 100)
    optimizer, sparsifier = build(model, dst.methods.rigl(0.05, update_every=1, fraction=Constant(1.0), stop=1.0))
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        sparsifier.before_step()
        optimizer.step()
        rows = sparsifier.masks["weight"].sum(1)
        assert int(rows.sum()) == 500
        assert rows.max() <= 20
        assert int((rows > 0).sum()) > 80


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_update_waits_for_finite_gradients(value):
    model = nn.Linear(20, 20)
    optimizer, sparsifier = build(model, dst.methods.rigl(0.2, update_every=2))
    before = sparsifier.masks["weight"]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.weight.grad[3, 4] = value
    sparsifier.before_step()
    assert (sparsifier.updates, sparsifier.skipped) == (0, 1)
    optimizer.step()
    assert torch.equal(sparsifier.masks["weight"], before)
    assert model.weight[~before].eq(0).all()  # not even where the infinity was


def test_a_layer_with_one_weight_trains():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 30), nn.Linear(30, 1))
    optimizer, sparsifier = build(model, dst.methods.rigl(0.5, update_every=1))
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 1)).sum().backward()
        sparsifier.before_step()
        optimizer.step()
        assert int(sparsifier.masks["0.weight"].sum()) == 1


def test_frozen_weights_stay_dense_and_are_listed():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    _, sparsifier = build(model, dst.methods.rigl(0.2))
    assert list(sparsifier.masks) == ["1.weight"]
    assert torch.equal(model[0].weight, before)
    assert "frozen" in str(dst.plan(model, dst.methods.rigl(0.2)))
    model[1].weight.requires_grad_(False)
    with pytest.raises(ConfigurationError, match=r"0\.weight: frozen"):
        build(model, dst.methods.rigl(0.2))


def test_a_weight_frozen_in_training_keeps_its_connections(caplog):
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    optimizer, sparsifier = build(model, dst.methods.rigl(0.2, update_every=1))
    model[0].weight.requires_grad_(False)
    before = sparsifier.masks
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 20)).square().sum().backward()
        sparsifier.before_step()
        optimizer.step()
    assert torch.equal(sparsifier.masks["0.weight"], before["0.weight"])
    assert not torch.equal(sparsifier.masks["1.weight"], before["1.weight"])
    assert "0.weight had no gradient" in caplog.text


class Plain(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def training_step(self, batch, index):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_an_empty_loader_ends_without_harm():
    module, callback = Plain(), SparseTraining(dst.methods.rigl(0.5), total_steps=10)
    before = module.layer.weight.detach().clone()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning says, in several ways, that there is no data
        trainer.fit(module, DataLoader(TensorDataset(torch.empty(0, 8)), batch_size=4))
    assert torch.equal(module.layer.weight, before)
    assert callback.state_dict() == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["rigl", "set", "momentum_growth", "static"])
def test_every_floating_dtype_trains(dtype, name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 30)).to(dtype)
    optimizer, sparsifier = build(model, METHODS[name](), steps=24)
    for step in range(24):
        optimizer.zero_grad()
        images = torch.randn(4, 30, generator=torch.Generator().manual_seed(step)).to(dtype)
        model(images).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        for parameter_name, mask in sparsifier.masks.items():
            assert model.get_parameter(parameter_name)[~mask].eq(0).all()
    assert sparsifier.active == 540
    assert all(p.dtype == dtype for p in model.parameters())


def test_integers_and_meta_tensors_are_refused_by_name():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigurationError, match=r"0\.weight is on the meta device"):
        build(model, dst.methods.rigl(0.5))
    with pytest.raises(ConfigurationError, match=r"0\.weight has no shape yet"):
        build(nn.Sequential(nn.LazyLinear(4)), dst.methods.rigl(0.5))
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.complex64))
    with pytest.raises(ConfigurationError, match=r"weight has dtype torch\.complex64"):
        build(model, dst.methods.rigl(0.5))
