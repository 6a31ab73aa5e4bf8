"""The ``Conv1D`` of transformers, storing only its non-zeros, against the masked backend."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from torch import nn

import dst
from dst import methods
from dst.allocation import Uniform
from dst.nn import SparseConv1D
from tests.backends import runs
from tests.backends.runs import (
    CLAIMED,
    DENSITY,
    OPTIMIZERS,
    Conv1D,
    Run,
    Transposed,
    check_accumulates_as_masked,
    check_continues_with,
    check_copy_becomes_dense,
    check_resumes,
    check_trains_as_masked,
    measured_cases,
    restored,
)
from tests.sampling import rotated


@pytest.mark.parametrize(
    ("name", "optimizer"),
    rotated(
        ["rigl", "rigl_with_step", "rigl_no_regrowth", "rigl_rescaled", "rigl_by_magnitude", "set", "gradient_drop"],
        OPTIMIZERS,
    ),
)
def test_trains_as_a_masked_one(name, optimizer):
    csr = check_trains_as_masked(name, optimizer, Transposed)
    assert isinstance(csr.model.first, SparseConv1D)


def test_accumulated_gradients():
    check_accumulates_as_masked(Transposed)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_is_identical(optimizer):
    check_resumes(optimizer, Transposed)


@pytest.mark.parametrize(("before", "after"), [("masked", "csr"), ("csr", "masked")])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_continues_with_the_other_backend(before, after, optimizer):
    check_continues_with(before, after, optimizer, Transposed)


def test_it_becomes_the_dense_layer_again():
    model = check_copy_becomes_dense(Transposed, copy.deepcopy)
    assert type(model.first) is Conv1D
    assert (model.first.nf, model.first.nx) == (40, 30)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(again, monkeypatch):
    # pickle looks the class up by its module
    for name in ("transformers", "transformers.pytorch_utils"):
        monkeypatch.setitem(sys.modules, name, runs)
    model = Run(CLAIMED["rigl"]("csr"), net=Transposed).train(3).model
    x = torch.randn(2, 3, 30, dtype=torch.float64)
    copied = again(model)
    assert torch.equal(copied(x), model(x))
    assert torch.equal(copied.first.positions(), model.first.positions())


def test_positions_have_the_layout_of_the_dense_weight():
    mask = torch.rand(7, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    positions = mask.reshape(-1).nonzero().squeeze(1)
    values = torch.arange(1.0, positions.numel() + 1)
    layer = SparseConv1D(7, 5, positions, values, dense_type=Conv1D)
    assert torch.equal(layer.positions(), positions)
    assert torch.equal(layer.mask(), mask)
    dense = torch.zeros(7, 5)
    dense[mask] = values
    assert torch.equal(layer.dense_weight(), dense)
    x, (layer.bias.data, *_) = torch.randn(4, 3, 7), (torch.randn(5),)
    torch.testing.assert_close(layer(x), x @ dense + layer.bias)


def test_the_dry_run_and_selectors():
    method = methods.rigl(DENSITY, allocation=Uniform(), backend="csr")
    rows = {row.name: (row.storage, row.note, row.shape) for row in dst.plan(Transposed(), method).rows}
    assert rows["first.weight"] == ("csr", "", (30, 40))
    model = dst.prepare(Transposed(), method, include=[Conv1D])
    assert isinstance(model.second, SparseConv1D)
    assert isinstance(model.head, nn.Linear)
    assert [row.kind for row in dst.plan(model, method, include=[Conv1D]).rows][:2] == ["SparseConv1D"] * 2


def test_auto_measures_it_as_a_linear_layer(monkeypatch):
    cases = measured_cases(monkeypatch)
    method = methods.rigl(DENSITY, allocation=Uniform(), backend="auto")
    model = dst.prepare(Transposed(), method)
    assert (cases[0].kind, cases[0].inputs, cases[0].outputs) == (nn.Linear, 30, 40)
    fresh = restored(Transposed(), model.state_dict())
    assert torch.equal(fresh.first.dense_weight(), model.first.dense_weight())
