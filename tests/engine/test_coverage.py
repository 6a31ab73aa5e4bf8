"""Which layers of various models are found, and how much of a model is sparse."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import dst
from dst import methods
from dst.allocation import Uniform
from dst.init import Magnitude
from dst.patterns import NM, FanIn, Neuron
from dst.topology.chains import sequences
from dst.topology.layers import find_layers
from tests.backends.runs import Conv1D


class Own(nn.Module):
    """A user's module with unknown dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel


def sparsifier(model: nn.Module, method: dst.Method, **settings: Any) -> dst.Sparsifier:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    return dst.Sparsifier(model, optimizer, method, total_steps=20, **settings)


def twins(method: dst.Method) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masks and weights of a linear layer and of a Conv1D with the same weights."""
    torch.manual_seed(0)
    linear, conv = nn.Linear(8, 12), Conv1D(12, 8)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.t())
    masks = [sparsifier(net, method).masks["weight"] for net in (linear, conv)]
    return masks[0], masks[1], linear.weight.detach(), conv.weight.detach()


@pytest.mark.parametrize("pattern", [Neuron(), FanIn(), NM(2, 4)])
def test_conv1d_has_patterns_over_its_outputs(pattern: Any) -> None:
    method = methods.static(0.5, sparsify_at=0, init=Magnitude(), pattern=pattern, allocation=Uniform())
    of_linear, of_conv, _, _ = twins(method)
    assert torch.equal(of_conv, of_linear.t())
    assert not torch.equal(of_linear.sum(1), of_linear.sum(1).flip(0)) or not isinstance(pattern, Neuron)


def test_conv1d_is_rescaled_by_its_fan_in() -> None:
    method = methods.static(0.3, sparsify_at=0, init=Magnitude(), allocation=Uniform())
    _, _, linear, conv = twins(methods.rigl(0.3, init=Magnitude(), rescale_init=True, allocation=Uniform()))
    assert torch.allclose(conv, linear.t())
    assert not torch.allclose(conv, twins(method)[3])


def test_chains_go_through_conv1d() -> None:
    model = nn.Sequential(Conv1D(6, 10), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), Conv1D(9, 4))
    layers, _ = find_layers(model)
    (run,) = sequences(layers)
    assert [layer.label for layer in run] == ["0.weight", "2.weight", "4.weight"]
    made = sparsifier(model, methods.cht(0.3, update_every=2))
    for _ in range(8):
        model(torch.randn(4, 10)).square().mean().backward()
        made.before_step()
        made._training.steppers[0].optimizer.step()
    assert made.updates > 2


def test_the_real_conv1d() -> None:
    utils = pytest.importorskip("transformers.pytorch_utils")
    layers, _ = find_layers(utils.Conv1D(12, 8))
    assert [(x.shape, x.output_dim, x.is_oriented) for x in layers] == [((8, 12), 1, True)]


def test_methods_that_need_outputs_refuse_a_layer_of_unknown_orientation() -> None:
    message = r"the output and input dimensions of 0\.kernel, and Own is not a known layer"
    for method in (methods.srigl(0.3), methods.rigl(0.3, rescale_init=True), methods.cht(0.3), methods.sr_ste(0.5)):
        with pytest.raises(dst.ConfigurationError, match=message):
            sparsifier(nn.Sequential(Own()), method, include=["*kernel"])
        with pytest.raises(dst.ConfigurationError, match=message):
            dst.plan(nn.Sequential(Own()), method, include=["*kernel"])
    assert sparsifier(nn.Sequential(Own()), methods.rigl(0.25), include=["*kernel"]).active == 24


# -- how much is sparse --------------------------------------------------------------------------------------------


def mostly_unknown() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), parametrizations.weight_norm(nn.Linear(40, 50)), Own())


def test_a_model_that_stays_mostly_dense_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        sparsifier(mostly_unknown(), methods.rigl(0.3, update_every=2))
    assert "98.5% of the weights stay dense: 1.parametrizations.weight.original1 (2,000:" in caplog.text
    assert "98.5% of the weights stay dense" in str(dst.plan(mostly_unknown(), methods.rigl(0.3)))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sparsifier(mostly_unknown(), methods.rigl(0.3, update_every=2), include=["0.weight"])  # chosen
        sparsifier(nn.Sequential(nn.Embedding(500, 8), nn.Linear(8, 4)), methods.rigl(0.3, update_every=2))
        sparsifier(nn.Sequential(nn.Linear(8, 9), Own()), methods.rigl(0.3, update_every=2), exclude=["*kernel"])
    assert "stay dense" not in caplog.text


def test_layers_that_thaw_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(8, 40), nn.Linear(40, 8))
    model[0].requires_grad_(False)
    made = sparsifier(model, methods.rigl(0.3, update_every=2))
    for step in range(6):
        if step == 3:
            model[0].requires_grad_(True)
        model(torch.randn(4, 8)).square().mean().backward()
        with caplog.at_level(logging.WARNING):
            made.before_step()
        made._training.steppers[0].optimizer.step()
        assert ("0.weight began to train" in caplog.text) == (step >= 3)
    assert caplog.text.count("began to train") == 1


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_gains_of_weight_norm_stay_dense() -> None:
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(16, 64)))
    made = sparsifier(model, methods.sparse_from_scratch(0.1))
    assert set(made.masks) == {"0.weight_v"}
    assert {d.name: d.reason for d in made.dense_weights} == {"0.weight_g": "gain of weight_norm"}


def test_pruned_modules_are_refused_until_that_is_permanent() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    with pytest.raises(dst.ConfigurationError, match=r"0\.weight_orig is pruned .*prune\.remove\(module, 'weight'\)"):
        sparsifier(model, methods.rigl(0.5))
    zero = model[0].weight == 0
    prune.remove(model[0], "weight")
    made = sparsifier(model, methods.static(0.5, sparsify_at=0, init=Magnitude(), allocation=Uniform()))
    assert torch.equal(made.masks["0.weight"], ~zero)


# -- what was sparse before ----------------------------------------------------------------------------------------


def step(model: nn.Module, made: dst.Sparsifier) -> None:
    model(torch.randn(4, 40)).square().mean().backward()
    made.before_step()
    made._training.steppers[0].optimizer.step()


def test_a_random_mask_over_a_sparse_model_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 10))
    method = methods.rigl(0.2, update_every=5)
    first = sparsifier(model, method)
    step(model, first)
    assert "sparse before" not in caplog.text
    first.finalize()
    saved, weights = first.state_dict(), {n: p.detach().clone() for n, p in model.named_parameters()}

    def again(method: dst.Method, load: bool = False) -> str:
        caplog.clear()
        model.load_state_dict(weights)
        made = sparsifier(model, method)
        if load:
            made.load_state_dict(saved)
        with caplog.at_level(logging.WARNING):
            step(model, made)
            step(model, made)
        return caplog.text

    text = again(method)
    assert text.count("the model was sparse before") == 1
    assert "load_state_dict" in text
    assert "init=dst.init.Magnitude()" in text
    assert "sparse before" not in again(method, load=True)
    assert "sparse before" not in again(methods.rigl(0.2, update_every=5, init=Magnitude()))


def test_layers_that_begin_at_zero_are_not_taken_for_sparse(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 10))
    nn.init.zeros_(model[1].weight)
    with caplog.at_level(logging.WARNING):
        step(model, sparsifier(model, methods.rigl(0.2, update_every=5)))
    assert "sparse before" not in caplog.text


def test_a_second_sparsifier_on_an_optimizer_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(40, 30))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = methods.rigl(0.2, update_every=5)
    first = dst.Sparsifier(model, optimizer, method, total_steps=20)
    with pytest.raises(dst.ConfigurationError, match=r"SGD trains for another sparsifier already, Sparsifier\(rigl"):
        dst.Sparsifier(model, optimizer, method, total_steps=20)
    first.finalize()
    dst.Sparsifier(model, optimizer, method, total_steps=20)
