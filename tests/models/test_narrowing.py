"""Narrower dense networks: the models' widths, the factor that matches a density, and ``small_dense``."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from torch import nn

import dst
from dst import methods
from dst.errors import ConfigurationError
from dst.method import LotterySchedule, Method, Narrow
from dst.metrics import layer_macs
from dst.models import (
    GPT,
    MLP,
    WRN22_2,
    ConvNet,
    GRUCharModel,
    GRUClassifier,
    LeNet300100,
    ResNet20,
    ViTTiny,
    WideResNet,
    narrow,
)
from dst.models.common import scaled
from dst.relaxations import StraightThrough
from dst.schedules import Every
from dst.scores import Magnitude
from dst.topology.layers import find_layers
from tests.sampling import rotated

IMAGES = ((3, 16, 16), 10)
TEXT = (40, 8)
MAKES = {
    "lenet": partial(LeNet300100, *IMAGES),
    "mlp": partial(MLP, *IMAGES),
    "convnet": partial(ConvNet, *IMAGES),
    "resnet": partial(ResNet20, *IMAGES),
    "wrn": partial(WRN22_2, *IMAGES),
    "wide_resnet": partial(WideResNet, *IMAGES, depth=10, widen_factor=1),
    "vit": partial(ViTTiny, *IMAGES, depth=2),
    "gru": partial(GRUClassifier, *IMAGES),
    "gpt": partial(GPT, *TEXT, depth=3),
    "gpt_experts": partial(GPT, *TEXT, depth=2, experts=2),
    "gru_char": partial(GRUCharModel, *TEXT),
}


def is_text(make):
    return make.args == TEXT


def example(make):
    return torch.zeros(1, TEXT[1], dtype=torch.int64) if is_text(make) else IMAGES[0]


def sparsifiable(model):
    return sum(layer.weights for layer in find_layers(model)[0])


def shapes(model):
    return [tuple(p.shape) for p in model.parameters()]


def test_scaled_widths_are_the_nearest_that_can_be():
    assert [scaled(10, f) for f in (1.0, 0.94, 0.95, 0.04, 1e-9, 2)] == [10, 9, 10, 1, 1, 20]
    assert [scaled(12, f, 3) for f in (1.0, 0.63, 0.62, 0.01)] == [12, 9, 6, 3]
    widths = [scaled(7, f / 1000, 2) for f in range(1, 1001)]
    assert widths == sorted(widths)
    for factor in (0, -1.0, float("nan"), float("inf"), "1", True):
        with pytest.raises(ConfigurationError, match="width_factor must be a positive number"):
            scaled(10, factor)


@pytest.mark.parametrize("name", MAKES)
def test_a_factor_of_one_changes_nothing_and_others_scale_every_hidden_width(name):
    make = MAKES[name]
    with torch.device("meta"):
        whole, same, half = make(), make(width_factor=1.0), make(width_factor=0.5)
        wider = make(width_factor=2)
    assert shapes(same) == shapes(whole)
    assert sparsifiable(wider) > 2 * sparsifiable(whole)
    for (label, full), narrower in zip(whole.named_parameters(), half.parameters(), strict=True):
        factors = {a / b for a, b in zip(narrower.shape, full.shape, strict=True)}
        assert factors <= {1.0, 0.5}, label
        assert 0.5 in factors or label.endswith(("classifier.bias", "head.bias"))


@pytest.mark.parametrize("name", MAKES)
def test_the_narrowest_networks_still_train(name):
    torch.manual_seed(0)
    make = MAKES[name]
    model = make(width_factor=1e-6)
    inputs = torch.randint(40, (4, 8)) if is_text(make) else torch.randn(4, *IMAGES[0])
    logits = model(inputs)
    assert logits.shape == ((4, 8, 40) if is_text(make) else (4, 10))
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.ndim > 1 and p.requires_grad) or "experts" in name


@pytest.mark.parametrize(
    ("name", "match"),
    rotated(["gpt", "gpt_experts", "gru_char", "convnet", "resnet", "wide_resnet", "lenet"], ["parameters", "flops"]),
)
def test_the_factor_matches_the_density_as_closely_as_whole_widths_can(name, match):
    make, density = MAKES[name], 0.1
    found = narrow(make, density, match, example=example(make))

    def cost(**factor):
        with torch.device("meta"):
            model = make(**factor)
        if match == "parameters":
            return sparsifiable(model)
        names = [layer.parameter for layer in find_layers(model)[0]]
        costs = layer_macs(model, example(make))
        return sum(costs[n] for n in names)

    whole = cost()

    def share(factor):
        return cost(width_factor=factor) / whole

    assert found.share == pytest.approx(share(found.width_factor))
    assert found.share == pytest.approx(density, rel=0.1)
    # No factor nearby, which could have other whole widths, comes nearer.
    others = [share(found.width_factor * (1 + i / 100)) for i in range(-12, 13, 3)]
    assert all(abs(found.share - density) <= abs(other - density) + 1e-12 for other in others)


def test_parameters_and_flops_ask_for_different_widths():
    make = MAKES["convnet"]
    factors = {match: narrow(make, 0.1, match, example=IMAGES[0]).width_factor for match in ("parameters", "flops")}
    # The first layer, whose inputs do not get fewer, has few weights and many positions.
    assert factors["flops"] < factors["parameters"]


def test_the_nearer_of_two_neighbours_is_taken_and_the_smaller_of_equals():
    class Steps(nn.Module):
        """Has as many weights as the factor says, in hundreds."""

        def __init__(self, width_factor: float = 1.0) -> None:
            super().__init__()
            self.layer = nn.Linear(100, scaled(10, width_factor))

    assert [narrow(Steps, d).share for d in (0.1, 0.24, 0.26, 0.25, 0.99, 1)] == [0.1, 0.2, 0.3, 0.2, 1.0, 1.0]
    assert narrow(Steps, 1) == dst.models.Narrowed(1.0, 1.0)


def test_weights_that_do_not_count():
    make = MAKES["lenet"]
    found = narrow(make, 0.1, exclude=["hidden.0.*"])
    with torch.device("meta"):
        narrower, whole = make(width_factor=found.width_factor), make()
    counted = [p.numel() for model in (narrower, whole) for n, p in model.named_parameters() if n in LATER]
    assert found.share == pytest.approx(sum(counted[:2]) / sum(counted[2:]))
    assert found.share == pytest.approx(0.1, rel=0.05)
    assert found.width_factor > 2 * narrow(make, 0.1).width_factor


def test_flops_of_weights_that_do_not_count():
    found = narrow(MAKES["lenet"], 0.1, "flops", example=IMAGES[0], exclude=["hidden.0.*"])
    assert found == narrow(MAKES["lenet"], 0.1, exclude=["hidden.0.*"])  # a linear layer multiplies once per weight


LATER = ("hidden.1.weight", "classifier.weight")


def test_random_generators_do_not_move():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    narrow(MAKES["gpt"], 0.3)
    assert torch.equal(torch.get_rng_state(), before)


class Foreign(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.layer = nn.Linear(input_shape[0], num_classes)


class Swallowing(Foreign):
    def __init__(self, input_shape, num_classes, **settings):
        super().__init__(input_shape, num_classes)


class Peeking(nn.Module):
    def __init__(self, width_factor=1.0):
        super().__init__()
        self.layer = nn.Linear(10, scaled(10, width_factor))
        self.scale = self.layer.weight.abs().max().item()


@pytest.mark.parametrize(
    ("make", "density", "settings", "message"),
    [
        (
            partial(Foreign, (4,), 3),
            0.1,
            {},
            r"Foreign takes no width_factor.*width_factor: float = 1\.0.*sparsity=dense",
        ),
        (partial(Swallowing, (4,), 3), 0.1, {}, "Swallowing has at its narrowest, 1 of its .*changes nothing"),
        (Peeking, 0.1, {}, "Peeking cannot be built with width_factor=1 on the meta device"),
        (
            MAKES["lenet"],
            0.001,
            {},
            r"density=0\.001 is less than LeNet300100 has at its narrowest, 0\.00298 of its parameters",
        ),
        (MAKES["lenet"], 0, {}, "density=0 must lie"),
        (MAKES["lenet"], True, {}, "density=True must lie"),
        (MAKES["lenet"], 0.1, {"match": "seconds"}, "match='seconds' is unknown; choose from parameters, flops"),
        (MAKES["lenet"], 0.1, {"match": "flops"}, "pass an example"),
        (MAKES["lenet"], 0.1, {"exclude": ["nothing"]}, "nothing"),
    ],
)
def test_refuses_what_cannot_be_narrowed(make, density, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        narrow(make, density, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"density": 0.5},
        {"clock": Every(1), "drop": Magnitude(), "grow": Magnitude()},
        {"lottery": LotterySchedule()},
        {"relaxation": StraightThrough()},
    ],
)
def test_only_dense_methods_are_narrow(settings):
    with pytest.raises(ConfigurationError, match=r"m: narrow is for dense networks.*density=1"):
        Method(**{"name": "m", "density": 1.0, "narrow": Narrow(0.1), **settings})


@pytest.mark.parametrize(("wrong", "message"), [((0.0,), "density=0.0"), ((0.1, "time"), "match='time'")])
def test_refuses_what_no_width_can_match(wrong, message):
    with pytest.raises(ConfigurationError, match=message):
        Narrow(*wrong)
    with pytest.raises(ConfigurationError, match=message):
        methods.small_dense(wrong[0], **({"match": wrong[1]} if wrong[1:] else {}))


def test_a_sparsifier_warns_that_it_trains_the_model_dense(caplog):
    model = nn.Linear(20, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with caplog.at_level(logging.WARNING):
        sparsifier = dst.Sparsifier(model, optimizer, methods.small_dense(0.1), total_steps=2)
    (record,) = caplog.records
    assert "small_dense makes nothing sparse" in record.getMessage()
    assert "dst.models.narrow" in record.getMessage()
    assert sparsifier.active == 200
    sparsifier.finalize()
    caplog.clear()
    for quiet in (methods.dense(), Method("small_dense", 1.0, narrow=Narrow(0.1, width_factor=0.3))):
        dst.Sparsifier(model, optimizer, quiet, total_steps=2).finalize()
    assert not caplog.records
