"""Runs that change their backend halfway: states convert in both directions, and training continues."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dst
from dst import methods
from dst.errors import ConfigurationError, StateError
from dst.nn import FeatureMajorLinear, SparseLinear
from tests.backends.runs import CLAIMED, OPTIMIZERS, Bottleneck, Mixed, Net, Run, assert_same, saved, sparse_layers
from tests.sampling import rotated

METHODS = ["rigl", "rigl_with_step", "set", "sparse_from_scratch"]


CASES = rotated(METHODS, OPTIMIZERS, [Net, Mixed, Bottleneck], each=2)


@pytest.mark.parametrize(("name", "optimizer", "net"), CASES)
def test_a_masked_run_continues_in_csr(name, optimizer, net):
    masked = Run(CLAIMED[name]("masked"), optimizer, net=net).train(9)
    state = saved(masked)
    csr = Run(CLAIMED[name]("csr"), optimizer, net=net)
    csr.model.load_state_dict(state["model"])
    csr.sparsifier.load_state_dict(state["dst"])
    csr.optimizer.load_state_dict(dst.sparse_optimizer_state(csr.model, csr.optimizer, state["optimizer"]))
    assert_same(masked, csr, tolerance=0)
    assert_same(masked.train(10), csr.train(10))


@pytest.mark.parametrize(("name", "optimizer", "net"), CASES)
def test_a_csr_run_continues_masked(name, optimizer, net):
    csr = Run(CLAIMED[name]("csr"), optimizer, net=net).train(9)
    state = saved(csr)
    masked = Run(CLAIMED[name]("masked"), optimizer, net=net)
    weights = dst.dense_state_dict(csr.model)
    assert list(weights) == list(masked.model.state_dict())
    masked.model.load_state_dict(weights)
    masked.optimizer.load_state_dict(dst.dense_optimizer_state(csr.model, csr.optimizer))
    masked.sparsifier.load_state_dict(state["dst"])
    assert_same(masked, csr, tolerance=0)
    assert_same(masked.train(10), csr.train(10))


@pytest.mark.parametrize("net", [Net, Bottleneck])
def test_a_model_becomes_dense_again(net):
    csr = Run(CLAIMED["rigl"]("csr"), net=net).train(9)
    weights, x = dst.dense_state_dict(csr.model), torch.randn(5, 30, dtype=torch.float64)
    calls = []
    csr.model.head.register_forward_hook(lambda *_: calls.append(1))
    expected = csr.model(x)
    model = dst.to_dense(copy.deepcopy(csr.model))
    assert not any(isinstance(m, (SparseLinear, FeatureMajorLinear)) for m in model.modules())
    assert all(torch.equal(weights[n], w) for n, w in model.state_dict().items())
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 2
    assert isinstance(dst.to_dense(dst.prepare(nn.Linear(9, 9), methods.rigl(0.2, backend="csr"))), nn.Linear)


def test_connections_that_hold_a_zero_are_not_lost():
    """Grown connections are zero: the masks say that they are active, the weights cannot."""
    masked = Run(CLAIMED["rigl"]("masked")).train(3)
    weight, mask = masked.model.first.weight, masked.sparsifier.masks["first.weight"]
    assert int((weight != 0).sum()) < int(mask.sum())
    csr = Run(CLAIMED["rigl"]("csr"))
    before = csr.model.first.values
    csr.model.load_state_dict(masked.model.state_dict())
    assert csr.model.first.values is before
    assert csr.model.first.nnz == int(mask.sum())
    assert torch.equal(csr.model.first.dense_weight(), weight)
    csr.sparsifier.load_state_dict(masked.sparsifier.state_dict())
    assert torch.equal(csr.model.first.mask(), mask)
    assert torch.equal(csr.model.first.dense_weight(), weight)


def test_what_does_not_fit_is_refused():
    csr = Run(CLAIMED["rigl"]("csr"))
    with pytest.raises(RuntimeError, match=r"first\.weight: saved with 1200 non-zeros, this layer holds 196"):
        csr.model.load_state_dict(Net().double().state_dict())
    with pytest.raises(RuntimeError, match=r"weight: saved with shape \(2, 3\), this layer has shape \(25, 40\)"):
        csr.model.second.load_state_dict({"weight": torch.zeros(2, 3), "bias": torch.zeros(25)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        csr.model.second.load_state_dict(
            {"weight": torch.zeros(25, 40), "bias": torch.zeros(25), "extra": torch.ones(1)}
        )
    other = torch.optim.SGD(csr.model.first.parameters(), 0.1)
    with pytest.raises(StateError, match="the state has 2 parameters, the optimizer 6"):
        dst.sparse_optimizer_state(csr.model, csr.optimizer, other.state_dict())
    masked = methods.rigl(0.2)
    with pytest.raises(ConfigurationError, match=r"dst\.to_dense"):
        dst.Sparsifier(csr.model, csr.optimizer, masked, total_steps=3)


def test_a_model_without_sparse_layers_is_as_it_was():
    model = Net()
    assert dst.to_dense(model) is model
    assert sparse_layers(model) == []
    assert list(dst.dense_state_dict(model)) == list(model.state_dict())


class Pretrained(nn.Sequential):
    """As a Hugging Face model: it can save itself."""

    def save_pretrained(self, folder: str) -> str:
        return folder


def test_a_model_of_non_zeros_points_to_its_dense_form_when_it_is_saved():
    model = Pretrained(nn.Linear(30, 40), nn.Linear(40, 10))
    model = dst.prepare(model, methods.rigl(0.2, backend="csr"))
    with pytest.raises(ConfigurationError, match=r"dst\.to_dense\(model\)"):
        model.save_pretrained("here")
    assert dst.to_dense(model).save_pretrained("here") == "here"
