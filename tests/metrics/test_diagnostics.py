"""Diagnostics: hand-worked masks, classes against functions, and paths against a search."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from torch import nn

import dst
from dst import metrics
from dst.errors import ConfigurationError
from dst.models import WRN22_2, ConvNet, LeNet300100
from tests import small

DIAGNOSTICS = ("topology", "health", "training", "diagnostics")


@pytest.mark.parametrize("name", [*DIAGNOSTICS, "memory", "energy"])
def test_examples_of_the_docstrings(name):
    module = importlib.import_module(f"dst.metrics.{name}")
    failed, run = doctest.testmod(module)
    assert failed == 0
    assert run > 0


def test_every_diagnostic_has_a_formula_and_an_example():
    for name in metrics.__all__:
        thing = getattr(metrics, name)
        module = getattr(thing, "__module__", "")
        if module.rpartition(".")[2] in DIAGNOSTICS:
            assert ".. math::" in thing.__doc__, name
            assert ">>>" in thing.__doc__, name


def bits(*rows: str) -> torch.Tensor:
    return torch.tensor([[character == "1" for character in row] for row in rows])


A = {"x": bits("1100", "0110"), "y": bits("10", "01")}
B = {"x": bits("1010", "0110"), "y": bits("11", "01")}


def test_functions_by_hand():
    assert metrics.mask_density(A) == 6 / 12
    assert metrics.mask_churn(A, B) == 2 / 7
    assert metrics.mask_overlap(A, B) == 5 / 8
    assert metrics.mask_overlap(A, B, over="active") == torch.tensor(5 / 6)
    assert metrics.exploration_rate([A, B]) == torch.tensor(8 / 12)
    dense = {"x": A["x"], "y": torch.ones(2, 2, dtype=torch.bool)}
    assert metrics.exploration_rate([A, dense]) == 4 / 8  # y is dense in the end
    assert metrics.exploration_rate([{"y": dense["y"]}]) == 1
    empty = {name: torch.zeros_like(mask) for name, mask in A.items()}
    assert metrics.mask_overlap(empty, empty) == 1
    assert metrics.mask_churn(A, empty) == 0
    assert metrics.collapsed_layers({"x": A["x"], "y": empty["y"]}) == ["y"]
    assert metrics.in_degrees(bits("1100", "1111", "0000")).tolist() == [2, 4, 0]
    assert metrics.in_degrees(bits("1100", "1111", "0000"), output_dim=1).tolist() == [2, 2, 1, 1]
    assert metrics.in_degree_histogram(bits("1100", "1111", "0000")).tolist() == [1, 0, 1, 0, 1]


def test_random_masks_overlap_by_chance():
    first, second = torch.rand(2, 400, 500) < 0.2
    assert metrics.mask_overlap(first, second, over="active") == pytest.approx(0.2, abs=0.01)
    assert metrics.mask_overlap(first, second) == pytest.approx(0.2 / 1.8, abs=0.01)


def test_nm_windows_run_along_inputs_and_the_last_may_be_short():
    mask = bits("110011", "111001")
    assert metrics.nm_conformance(mask, 2, 4) == 3 / 4
    assert metrics.nm_conformance(bits("110011"), 1, 4) == 0
    conv = torch.zeros(1, 4, 1, 2, dtype=torch.bool)
    conv[0, :2, 0, 0] = True
    conv[0, :, 0, 1] = True
    assert metrics.nm_conformance(conv, 2, 4) == 0.5
    assert metrics.nm_conformance(conv, 1, 2, dim=-1) == 0.5
    with pytest.raises(ConfigurationError, match="1 <= N <= M, got 5:4"):
        metrics.nm_conformance(mask, 5, 4)
    with pytest.raises(ConfigurationError, match="no dimension 2"):
        metrics.nm_conformance(mask, 2, 4, dim=2)


def test_dead_units_of_every_kind_of_layer():
    assert metrics.dead_outputs(bits("10", "00")).tolist() == [False, True]
    assert metrics.dead_inputs(bits("10", "00")).tolist() == [False, True]
    # A convolution of two groups: outputs 0, 1 read inputs 0, 1; outputs 2, 3 read inputs 2, 3.
    grouped = torch.zeros(4, 2, 3, 3, dtype=torch.bool)
    grouped[0, 1, 2, 2] = grouped[1, 1, 0, 0] = grouped[3, 0, 1, 1] = True
    assert metrics.dead_outputs(grouped).tolist() == [False, False, True, False]
    assert metrics.dead_inputs(grouped, groups=2).tolist() == [True, False, False, True]
    transposed = torch.zeros(2, 3, 2, 2, dtype=torch.bool)
    transposed[0, 1, 0, 0] = True
    assert metrics.dead_outputs(transposed, output_dim=1).tolist() == [True, False, True]
    assert metrics.dead_inputs(transposed, output_dim=1).tolist() == [False, True]
    for call in (
        lambda: metrics.dead_outputs(torch.ones(3, dtype=torch.bool)),
        lambda: metrics.dead_inputs(bits("10", "00", "11"), groups=2),
        lambda: metrics.dead_outputs(bits("10"), output_dim=2),
    ):
        with pytest.raises(ConfigurationError):
            call()


def paths(masks):
    """Effective connections of a chain of linear layers, by walking every path."""
    found = [torch.zeros_like(mask) for mask in masks]

    def walk(layer, unit, trail):
        if layer == len(masks):
            for i, (o, n) in enumerate(trail):
                found[i][o, n] = True
            return
        for output in masks[layer][:, unit].nonzero().flatten().tolist():
            walk(layer + 1, output, [*trail, (output, unit)])

    for unit in range(masks[0].shape[1]):
        walk(0, unit, [])
    return found


@pytest.mark.parametrize("seed", range(5))
def test_effective_connections_are_those_on_a_path(seed):
    torch.manual_seed(seed)
    masks = [torch.rand(o, i) < 0.25 for o, i in ((6, 5), (7, 6), (5, 7), (3, 5))]
    expected = paths(masks)
    effective = metrics.chain_effective_masks(masks)
    assert all(torch.equal(a, b) for a, b in zip(effective, expected, strict=True))
    assert sum(int(m.sum()) for m in expected) < sum(int(m.sum()) for m in masks)
    layers = [nn.Linear(m.shape[1], m.shape[0]) for m in masks]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])
    named = {f"{2 * i}.weight": mask for i, mask in enumerate(masks)}
    by_autograd = metrics.effective_masks(model, named, (5,))
    assert all(torch.equal(a, b) for a, b in zip(by_autograd.values(), expected, strict=True))
    assert metrics.effective_density(masks) == metrics.mask_density(expected)


def test_channels_stand_for_several_features_after_flatten():
    conv = torch.zeros(3, 2, 2, 2, dtype=torch.bool)
    conv[0, 0, 0, 1] = conv[1, 1, 1, 1] = conv[2, 0, 0, 0] = True
    linear = torch.zeros(2, 12, dtype=torch.bool)  # 3 channels of 2x2 features
    linear[0, 1] = linear[1, 8] = True  # channels 0 and 2
    first, second = metrics.chain_effective_masks([conv, linear])
    assert not first[1].any()
    assert first.sum() == 2
    assert torch.equal(second, linear)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.MaxPool2d(1), nn.Flatten(), nn.Linear(12, 2))
    by_autograd = metrics.effective_masks(model, {"0.weight": conv, "4.weight": linear}, (2, 3, 3))
    assert torch.equal(by_autograd["0.weight"], first)
    assert torch.equal(by_autograd["4.weight"], linear)
    with pytest.raises(ConfigurationError, match="layer 1 has 12 inputs, which does not follow upon 5 outputs"):
        metrics.chain_effective_masks([torch.ones(5, 2, dtype=torch.bool), linear])


def test_skip_connections_are_followed():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1)

        def forward(self, x):
            x = x + self.b(torch.relu(self.a(x)))
            return self.c(x)

    masks = {"a.weight": bits("10", "01"), "b.weight": bits("10", "00"), "c.weight": bits("01")}
    effective = metrics.effective_masks(Residual(), masks, (2,))
    assert not effective["a.weight"].any()  # b carries unit 0 alone, and c reads unit 1 alone
    assert not effective["b.weight"].any()
    assert torch.equal(effective["c.weight"], masks["c.weight"])  # by the skip connection


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: LeNet300100((1, 4, 4), 3), (1, 4, 4)),
        (lambda: ConvNet((1, 8, 8), 3), (1, 8, 8)),
        (lambda: WRN22_2((3, 8, 8), 10), (3, 8, 8)),
        (small.Small, (2, 6, 6)),
        (
            lambda: nn.Sequential(
                nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True), 2), nn.Linear(8, 3)
            ),
            (5, 8),
        ),
        (lambda: nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, 2)), (9,)),
        (lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)), None),
    ],
)
def test_dense_networks_are_effective_and_unchanged(model, shape):
    model = model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    example = torch.zeros(2, 5, dtype=torch.long) if shape is None else shape
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.ndim > 1}
    if shape is None:
        del masks["0.weight"]  # one row alone is looked up
    effective = metrics.effective_masks(model, masks, example)
    assert metrics.mask_density(effective) == 1, {n: float(metrics.mask_density(m)) for n, m in effective.items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_effective_masks_refuse_what_does_not_fit():
    model = nn.Linear(2, 1)
    with pytest.raises(ConfigurationError, match=r"mask of weight has shape \(2, 2\), the model \(1, 2\)"):
        metrics.effective_masks(model, {"weight": bits("10", "11")}, (2,))
    with pytest.raises(ConfigurationError, match="no such parameter"):
        metrics.effective_masks(model, {"other": bits("10")}, (2,))


def test_gradient_norms_by_hand():
    gradients = {"a": torch.tensor([[3.0, -4.0], [2.0, 0.0]]), "b": torch.tensor([[1.0, 12.0]])}
    masks = {"a": bits("11", "00"), "b": bits("01")}
    active, inactive = metrics.gradient_norms(gradients, masks)
    assert active == 13
    assert inactive == torch.tensor(5.0).sqrt()
    with pytest.raises(ConfigurationError, match="no gradient of b"):
        metrics.gradient_norms({"a": gradients["a"]}, masks)
    with pytest.raises(ConfigurationError, match="gradient of a has shape"):
        metrics.gradient_norms({"a": gradients["b"], "b": gradients["b"]}, masks)


def test_the_inactive_gradient_exists_before_the_step():
    model = small.Small()
    optimizer = small.OPTIMIZERS["sgd"](model.parameters())
    sparsifier = dst.Sparsifier(model, optimizer, dst.methods.static(0.3, sparsify_at=0), total_steps=4)
    small.backward(model, optimizer, 0)
    gradients = {name: model.get_parameter(name).grad for name in sparsifier.masks}
    whole = torch.cat([g.flatten() for g in gradients.values()]).norm()
    active, inactive = metrics.gradient_norms(gradients, sparsifier.masks)
    assert inactive > 0
    assert (active**2 + inactive**2).sqrt() == pytest.approx(float(whole), rel=1e-5)
    sparsifier.before_step()
    assert metrics.gradient_norms(gradients, sparsifier.masks)[1] == 0


def test_loss_spikes_by_hand():
    losses = [4.0, 2.0, 2.0, 3.0, 1.0, 2.0, 5.0]
    assert metrics.loss_spikes(losses, [2], window=2).tolist() == [0.5]
    assert metrics.loss_spikes(losses, [2], window=1).tolist() == [0.5]
    assert metrics.loss_spikes(losses, [2, 5], window=3).tolist() == pytest.approx([3 / (8 / 3) - 1, 5 / 2 - 1])
    assert metrics.loss_spikes(losses, [0, 6, 9], window=2).numel() == 0  # no window before, or nothing after
    with pytest.raises(ConfigurationError, match="window=0"):
        metrics.loss_spikes(losses, [2], window=0)
    with pytest.raises(ConfigurationError, match="step -1"):
        metrics.loss_spikes(losses, [-1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.mask_density(torch.ones(3)), "bool tensor, got torch.float32; pass weights as weight != 0"),
        (lambda: metrics.mask_density({"a": 1}), "got int"),
        (lambda: metrics.mask_density([]), "no masks"),
        (lambda: metrics.exploration_rate([]), "no masks"),
        (lambda: metrics.mask_churn(A, {"x": A["x"]}), "different layers: y"),
        (lambda: metrics.mask_churn(A["x"], A["y"]), "different shapes"),
        (lambda: metrics.mask_overlap(A, B, over="all"), "over='all'"),
        (lambda: metrics.MaskOverlap(over="all"), "over='all'"),
        (lambda: metrics.DeadUnits("sides"), "side='sides'"),
        (lambda: metrics.LossSpikes(window=0), "window=0"),
        (lambda: metrics.InDegreeHistogram(0), "largest=0"),
        (lambda: metrics.ExplorationRate({"x": (2, 2)}).update(A), "not of the shapes"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ConfigurationError, match=message):
        call()


def test_classes_accumulate_and_reset():
    masks = bits("1000", "1111"), bits("1100", "0000")
    density = metrics.MaskDensity()
    for mask in masks:
        density.update(mask)
    assert density.compute() == 7 / 16
    density.reset()
    density.update(masks[1])
    assert density.compute() == 2 / 8

    dead = metrics.DeadUnits("inputs")
    dead.update(masks)
    assert dead.compute() == 2 / 8
    dead.update([masks[1]], output_dims=[1])
    assert dead.compute() == 3 / 10

    collapsed = metrics.CollapsedLayers()
    collapsed.update({"a": torch.zeros(2, dtype=torch.bool), "b": torch.zeros(2, dtype=torch.bool)})
    collapsed.update({"a": masks[0], "b": masks[1]})
    assert collapsed.compute() == 2

    histogram = metrics.InDegreeHistogram(2)
    for mask in masks:
        histogram.update(mask)
    assert histogram.compute().tolist() == [0.25, 0.25, 0.5]

    norms = metrics.GradientNorms()
    for scale in (1.0, 7.0):
        norms.update({"w": torch.full((2, 4), scale)}, {"w": masks[1]})
    assert norms.compute()["active"] == (2 * (1 + 49) / 2) ** 0.5
    early = metrics.LossSpikes()
    early.update(1.0, updated=True)
    assert torch.isnan(early.compute())


def test_exploration_of_a_real_run_equals_the_sparsifiers():
    model = small.Small()
    optimizer = small.OPTIMIZERS["sgd"](model.parameters())
    sparsifier = dst.Sparsifier(model, optimizer, dst.methods.set_(0.3, update_every=2), total_steps=12)
    metric = metrics.ExplorationRate({name: mask.shape for name, mask in sparsifier.masks.items()})
    churn = metrics.MaskChurn()
    history = [sparsifier.masks]
    metric.update(sparsifier.masks)
    for step in range(12):
        small.train(model, optimizer, sparsifier, 1, first=step)
        metric.update(sparsifier.masks)
        if sparsifier.last_update and sparsifier.last_update.step == step:
            churn.reset()
            churn.update(history[-1], sparsifier.masks)
            assert churn.compute() == pytest.approx(sparsifier.churn)
        history.append(sparsifier.masks)
    assert metric.compute() == pytest.approx(sparsifier.exploration_rate)
    assert metric.compute() == metrics.exploration_rate(history)
    assert 0.3 < metric.compute() < 1


def test_state_of_a_class_survives_pickling_and_saving():
    import pickle

    metric = metrics.LossSpikes(window=1)
    metric.update(1.0, updated=True)
    again = pickle.loads(pickle.dumps(metric))
    again.update(3.0, updated=False)
    assert again.compute() == 2
