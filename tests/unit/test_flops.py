"""FLOPs: hand-computed layers, RigL's published table, and that measuring leaves no trace."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import nn

from dst.allocation import ERK
from dst.errors import ConfigurationError
from dst.metrics import (
    inference_flops,
    inference_ratio,
    layer_macs,
    rigl_training_flops,
    static_training_flops,
    training_ratio,
    uncounted,
)
from dst.models import WRN22_2, LeNet300100


def erk_densities(shapes: dict[str, tuple[int, ...]], density: float) -> dict[str, float]:
    return dict(zip(shapes, ERK().densities(list(shapes), list(shapes.values()), density), strict=True))


@pytest.mark.parametrize(
    ("module", "example", "expected"),
    [
        (nn.Linear(3, 5), (3,), 15),
        (nn.Linear(3, 5), (7, 3), 15 * 7),  # a sequence of 7 rows
        (nn.Conv1d(2, 4, 3), (2, 10), 4 * 2 * 3 * 8),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 9, 8), 8 * 3 * 9 * 5 * 4),
        (nn.Conv2d(4, 8, 3, groups=2, padding=1), (4, 5, 5), 8 * 2 * 9 * 25),
        (nn.Conv2d(6, 6, 3, groups=6, dilation=2), (6, 7, 7), 6 * 9 * 9),  # depthwise, 3x3 outputs
        (nn.Conv3d(1, 2, 2), (1, 3, 4, 5), 2 * 8 * 2 * 3 * 4),
        (nn.ConvTranspose1d(2, 3, 4, stride=2), (2, 5), 2 * 3 * 4 * 5),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 6), 4 * 3 * 9 * 30),
        (nn.ConvTranspose3d(1, 2, 2), (1, 2, 3, 4), 2 * 8 * 24),
    ],
)
def test_one_weight_by_hand(module, example, expected):
    assert layer_macs(module, example) == {"weight": expected}
    # Per sample, whatever the batch.
    assert layer_macs(module, torch.zeros(6, *example)) == {"weight": expected}
    assert layer_macs(module.to("meta"), example) == {"weight": expected}
    assert uncounted(module, {"weight": expected}) == []


def test_attention_counts_each_projection_by_its_own_tokens():
    query, memory = torch.zeros(2, 5, 8), torch.zeros(2, 7, 8)
    packed = nn.MultiheadAttention(8, 2, batch_first=True)
    macs = layer_macs(packed, (query, memory, memory))
    assert macs == {"in_proj_weight": 64 * (5 + 7 + 7), "out_proj.weight": 64 * 5}
    assert macs == layer_macs(packed, {"query": query, "key": memory, "value": memory})

    split = nn.MultiheadAttention(8, 2, kdim=3, vdim=4, batch_first=True)
    macs = layer_macs(split, (query, torch.zeros(2, 7, 3), torch.zeros(2, 7, 4)))
    assert macs == {
        "q_proj_weight": 64 * 5,
        "k_proj_weight": 24 * 7,
        "v_proj_weight": 32 * 7,
        "out_proj.weight": 64 * 5,
    }
    assert uncounted(split, macs) == []


def test_fused_encoder_layer_is_counted_and_fusing_stays_enabled():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    macs = layer_macs(model, torch.zeros(1, 5, 8))
    assert uncounted(model, macs) == []
    assert sum(macs.values()) == 2 * 5 * (4 * 64 + 2 * 128)
    # A padding mask would otherwise turn the batch into a nested tensor.
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert layer_macs(model, {"src": torch.zeros(2, 5, 8), "src_key_padding_mask": padding}) == macs
    assert torch.backends.mha.get_fastpath_enabled()


def test_recurrent_weights_run_once_per_token():
    lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2, batch_first=True, device="meta")
    macs = layer_macs(lstm, (6, 3))
    assert macs["weight_ih_l0"] == macs["weight_ih_l0_reverse"] == 16 * 3 * 6
    assert macs["weight_hh_l0"] == 16 * 2 * 6
    assert macs["weight_hr_l0"] == 2 * 4 * 6
    assert macs["weight_ih_l1"] == 16 * 4 * 6
    assert uncounted(lstm, macs) == []
    assert set(layer_macs(nn.GRU(3, 4, batch_first=True), (6, 3)).values()) == {12 * 3 * 6, 12 * 4 * 6}
    assert layer_macs(nn.RNNCell(3, 4), (3,)) == {"weight_ih": 12, "weight_hh": 16}
    # Time first: the leading dimension is no batch, so its size has to be said.
    time_first = layer_macs(nn.GRU(3, 4), torch.zeros(6, 2, 3), batch_size=2)
    assert time_first == layer_macs(nn.GRU(3, 4, batch_first=True), (6, 3))
    packed = nn.utils.rnn.pack_sequence([torch.zeros(4, 3), torch.zeros(2, 3)])
    assert layer_macs(nn.RNN(3, 4), (packed,), batch_size=2)["weight_ih_l0"] == 12 * 3


def test_repeated_modules_and_tied_weights_add_up_under_one_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.twice = nn.Linear(4, 4)
            self.norm = nn.LayerNorm((3, 4))
            self.decoder = nn.Linear(4, 10)
            self.decoder.weight = self.embedding.weight

        def forward(self, tokens):
            return self.decoder(self.norm(self.twice(self.twice(self.embedding(tokens)))))

    model = Tied()
    macs = layer_macs(model, torch.zeros(2, 3, dtype=torch.long))
    assert macs == {"embedding.weight": 3 * 40, "twice.weight": 2 * 3 * 16, "norm.weight": 0, "norm.bias": 0}
    assert uncounted(model, macs) == []
    assert layer_macs(nn.Embedding(10, 4), torch.zeros(1, 3, dtype=torch.long)) == {"weight": 0}


def test_uncounted_lists_every_weight_without_macs():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.zeros(1, 4))
            self.bilinear = nn.Bilinear(4, 4, 4)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.unused = nn.Linear(4, 4)
            self.used = nn.Linear(4, 4)

        def forward(self, x):
            x = x + self.position
            return self.used(self.normed(self.bilinear(x, x)))

    model = Odd()
    macs = layer_macs(model, (4,))
    assert macs == {"used.weight": 16}
    assert uncounted(model, macs) == [
        "position",
        "bilinear.weight",
        "normed.parametrizations.weight.original0",
        "normed.parametrizations.weight.original1",
        "unused.weight",
    ]


def test_measuring_leaves_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 2))
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer_macs(model, torch.rand(2, 3, 4, 4))
    assert [m.training for m in model] == [True, False, True, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError):
        layer_macs(model, (3, 9, 9))
    assert not any(m._forward_hooks for m in model.modules())
    assert model.training


def test_training_batch_norm_does_not_drift():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    layer_macs(model, torch.rand(5, 3))
    assert torch.equal(model[1].running_mean, torch.zeros(4))
    assert model[1].num_batches_tracked == 0


def test_runs_without_gradients_and_gives_random_draws_back():
    class Noisy(nn.Linear):
        def forward(self, x):
            assert not torch.is_grad_enabled()
            return super().forward(x + torch.rand_like(x))

    model = Noisy(3, 2)
    generator = torch.get_rng_state()
    assert layer_macs(model, (3,)) == {"weight": 6}
    assert torch.equal(torch.get_rng_state(), generator)


def test_compiled_model_is_measured_without_compiling():
    def refuse(graph, inputs):
        raise AssertionError("compiled")

    model = torch.compile(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), backend=refuse)
    macs = layer_macs(model, (3,))
    assert macs == {"_orig_mod.0.weight": 6}
    assert uncounted(model, macs) == []


def test_half_precision_models_get_an_example_of_their_type():
    assert layer_macs(nn.Linear(3, 2).bfloat16(), (3,)) == {"weight": 6}


def test_layer_macs_refuses_what_it_cannot_measure():
    with pytest.raises(ConfigurationError, match=r"0\.weight has no shape yet"):
        layer_macs(nn.Sequential(nn.LazyLinear(3)), (4,))
    with pytest.raises(ConfigurationError, match="holds no sample"):
        layer_macs(nn.Linear(3, 2), torch.zeros(0, 3))
    with pytest.raises(ConfigurationError, match="holds no sample"):
        layer_macs(nn.Linear(3, 2), torch.zeros(4, 3), batch_size=0)
    with pytest.raises(ConfigurationError, match=r"weight .* pass the true batch_size"):
        layer_macs(nn.Linear(3, 2), torch.zeros(4, 3), batch_size=5)


MACS = {"a": 100, "b": 300}


def test_inference_flops_by_hand():
    assert inference_flops(MACS, {}) == 800
    assert inference_flops(MACS, {"a": 0.5}) == 2 * (50 + 300)
    assert inference_flops(MACS, {"a": 0.5, "b": 0.0}, extra_flops=7) == 107
    assert inference_ratio(MACS, {"b": 0.5}) == 0.625
    assert inference_ratio(MACS, {"b": 0.5}, extra_flops=200) == 700 / 1000


def test_training_ratio_by_hand():
    # f_S / f_D = 0.25: a sparse step costs 3/4 f_D, one with a dense gradient 3/2 f_D, a dense one 3 f_D.
    densities = {"a": 0.25, "b": 0.25}
    assert training_ratio(MACS, densities, {"dense": 7}) == 1
    assert training_ratio(MACS, densities, {"sparse": 7, "dense": 0}) == 0.25
    assert training_ratio(MACS, densities, {"dense_gradient": 7}) == 0.5
    counts = {"dense": 1, "sparse": 2, "dense_gradient": 1}
    assert training_ratio(MACS, densities, counts) == (3 + 2 * 0.75 + 1.5) / (4 * 3)
    assert training_ratio(MACS, densities, {"sparse": 1}, extra_flops=800) == 1000 / 1600


def test_closed_forms_agree_with_step_counts():
    densities = {"a": 0.2, "b": 0.1}
    f_sparse, f_dense = inference_flops(MACS, densities), inference_flops(MACS, {})
    counts = {"sparse": 100, "dense_gradient": 1}
    expected = rigl_training_flops(f_sparse, f_dense, update_every=100) / (3 * f_dense)
    assert training_ratio(MACS, densities, counts) == pytest.approx(expected, rel=1e-12)
    assert rigl_training_flops(1, 10, update_every=3) == (9 + 2 + 10) / 4
    assert static_training_flops(5) == 15


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inference_flops(MACS, {"c": 0.5}), "c has a density but no MACs"),
        (lambda: inference_flops(MACS, {"a": 1.5}), "density of a must lie"),
        (lambda: inference_flops(MACS, {"a": float("nan")}), "density of a must lie"),
        (lambda: inference_ratio({}, {}), "costs no FLOPs"),
        (lambda: training_ratio(MACS, {}, {"sprase": 1}), "unknown kind of step 'sprase'"),
        (lambda: training_ratio(MACS, {}, {"sparse": -1}), "must not be negative"),
        (lambda: training_ratio(MACS, {}, {"sparse": 0}), "no step"),
        (lambda: rigl_training_flops(1, 2, 0), "update_every"),
    ],
)
def test_refuses_bad_numbers(call, message):
    with pytest.raises(ConfigurationError, match=message):
        call()


def test_wrn_22_2_as_in_rigl():
    model = WRN22_2((3, 32, 32), 10)
    macs = layer_macs(model, (3, 32, 32))
    assert uncounted(model, macs) == []
    assert sum(macs.values()) == 157_730_048
    shapes = {name: tuple(model.get_parameter(name).shape) for name in macs}
    assert sum(map(prod, shapes.values())) == 1_076_912
    assert inference_ratio(macs, erk_densities(shapes, 0.2)) == pytest.approx(0.3521, abs=5e-5)


def test_a_linear_network_costs_its_weights():
    model = LeNet300100((1, 28, 28), 10)
    assert sum(layer_macs(model, (1, 28, 28)).values()) == 266_200


def resnet50_layers() -> dict[str, tuple[tuple[int, ...], int]]:
    """Name -> (weight shape, output pixels) of ResNet-50 v1.5 on 224x224 images, as RigL counts it.

    The count takes the padding of conv1 twice, hence 115x115 outputs there; strides sit in the 3x3 layers.
    """
    layers: dict[str, tuple[tuple[int, ...], int]] = {"conv1": ((64, 3, 7, 7), 115**2)}
    channels, size = 64, 56
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=1):
        for block in range(blocks):
            before, size = size, size // (2 if stage > 1 and block == 0 else 1)
            prefix = f"layer{stage}.{block}"
            layers[f"{prefix}.conv1"] = ((width, channels, 1, 1), before**2)
            layers[f"{prefix}.conv2"] = ((width, width, 3, 3), size**2)
            layers[f"{prefix}.conv3"] = ((4 * width, width, 1, 1), size**2)
            if block == 0:
                layers[f"{prefix}.downsample"] = ((4 * width, channels, 1, 1), size**2)
            channels = 4 * width
    return layers | {"fc": ((1000, 2048), 1)}


@pytest.mark.parametrize(
    ("density", "erk", "uniform", "erk_training_5x"),
    [(0.2, 0.4153, 0.2254, 2.09), (0.1, 0.2431, 0.1285, 1.23)],
)
def test_resnet50_table_of_rigl(density, erk, uniform, erk_training_5x):
    layers = resnet50_layers()
    shapes = {name: shape for name, (shape, _) in layers.items()}
    macs = {name: prod(shape) * pixels for name, (shape, pixels) in layers.items()}
    # A dot product of n terms has n - 1 additions, bias and ReLU add one each: 2n + 1 per output.
    extra = sum(shape[0] * pixels for shape, pixels in layers.values())
    assert sum(map(prod, shapes.values())) == 25_502_912
    assert inference_flops(macs, {}, extra) == 8_202_340_776

    # Uniform leaves the first layer dense.
    uniform_densities = {name: 1.0 if name == "conv1" else density for name in layers}
    assert inference_ratio(macs, uniform_densities, extra) == pytest.approx(uniform, abs=5e-5)
    erk_by_name = erk_densities(shapes, density)
    assert inference_ratio(macs, erk_by_name, extra) == pytest.approx(erk, abs=5e-5)
    # Five times the schedule, updates every 100 steps.
    training = 5 * training_ratio(macs, erk_by_name, {"sparse": 100, "dense_gradient": 1}, extra)
    assert training == pytest.approx(erk_training_5x, abs=5e-3)
