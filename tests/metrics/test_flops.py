"""FLOPs: hand-computed layers, RigL's published table, and that measuring leaves no trace."""

from __future__ import annotations

from functools import cache
from math import prod

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dst
from dst.allocation import ERK, Uniform
from dst.errors import ConfigurationError
from dst.metrics import (
    CONVENTIONS,
    FlopsMeter,
    Operations,
    count_operations,
    flops_table,
    layer_macs,
)
from dst.models import WRN22_2, LeNet300100
from dst.nn import SparseLinear
from tests.metrics.uncounted import uncounted
from tests.resnet50 import ResNet50


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


def test_uncounted_lists_every_weight_that_takes_part_in_no_product():
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
    assert macs == {"bilinear.weight": 64, "used.weight": 16}
    assert uncounted(model, macs) == [
        "position",
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


def test_wrn_22_2_as_in_rigl():
    model = WRN22_2((3, 32, 32), 10)
    operations = count_operations(model, (3, 32, 32))
    macs = operations.macs
    assert uncounted(model, macs) == []
    assert sum(macs.values()) == 157_730_048
    shapes = {name: tuple(model.get_parameter(name).shape) for name in macs}
    assert sum(map(prod, shapes.values())) == 1_076_912
    table = flops_table(operations, erk_densities(shapes, 0.2))
    assert table.theoretical / table.dense == pytest.approx(0.3521, abs=5e-5)


def test_a_linear_network_costs_its_weights():
    model = LeNet300100((1, 28, 28), 10)
    assert sum(layer_macs(model, (1, 28, 28)).values()) == 266_200


@cache
def resnet50(pad_twice: bool):
    with torch.device("meta"):
        model = ResNet50(pad_twice)
    return model, count_operations(model, (3, 224, 224))


@pytest.mark.parametrize(
    ("density", "erk", "uniform", "erk_training_5x"),
    [(0.2, 0.4153, 0.2254, 2.09), (0.1, 0.2431, 0.1285, 1.23)],
)
def test_resnet50_table_of_rigl(density, erk, uniform, erk_training_5x):
    model, operations = resnet50(pad_twice=True)
    assert operations.warnings() == []
    shapes = {w.label: tuple(model.get_parameter(w.label).shape) for w in operations.weights}
    assert sum(w.weights for w in operations.weights) == 25_502_912
    by_erk = erk_densities(shapes, density)
    table = flops_table(operations, by_erk, convention="rigl")
    assert table.dense == 8_202_340_776
    assert table.theoretical / table.dense == pytest.approx(erk, abs=5e-5)
    assert table.executed == table.dense  # the masked backend multiplies by its zeros
    # Uniform leaves the first layer dense.
    uniformly = {name: density for name in shapes if name != "conv1.weight"}
    assert flops_table(operations, uniformly, convention="rigl").theoretical / table.dense == pytest.approx(
        uniform, abs=5e-5
    )
    # Five times the schedule, updates every 100 steps.
    meter = FlopsMeter(operations)
    active = {w.label: round(by_erk[w.label] * w.weights) for w in operations.weights}
    meter.add("sparse", active, 100)
    meter.add("dense_gradient", active, 1)
    assert 5 * meter.total("rigl").ratio == pytest.approx(erk_training_5x, abs=5e-3)
    assert meter.total("rigl").executed_ratio == 1


def test_resnet50_without_the_second_padding():
    _, operations = resnet50(pad_twice=False)
    assert sum(operations.macs.values()) == 4_089_184_256  # the figure of torchvision's table, 4.09 GMACs
    assert flops_table(operations, {}, convention="flops").dense == 2 * 4_089_184_256


def test_conventions_by_hand():
    operations = count_operations(nn.Linear(3, 5), (3,))
    assert flops_table(operations, {}, convention="macs").dense == 15
    assert flops_table(operations, {}, convention="flops").dense == 30
    assert flops_table(operations, {}, convention="rigl").dense == 5 * (3 + 2 + 1 + 1)
    sparse = flops_table(operations, {"weight": 0.2}, convention="rigl", backend="csr")
    assert (sparse.theoretical, sparse.executed) == (2 * 3 + 5, 2 * 3 + 5)
    assert flops_table(operations, {"weight": 0.2}, convention="rigl", backend="csr", stored=[]).executed == 35
    assert sum(CONVENTIONS[name].per_mac for name in ("macs", "flops", "rigl")) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 6])
def test_sparse_layers_execute_the_operations_of_their_non_zeros(batch, dtype):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, (5, 3), stride=2, padding=(2, 0), dilation=(1, 2)),
        nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(4 * 4 * 2, 5),
    ).to(dtype)  # fmt: skip
    images = torch.zeros(batch, 3, 8, 8, dtype=dtype)
    dense = count_operations(net, images)
    sparse = dst.prepare(net, dst.methods.rigl(0.3, allocation=Uniform(), backend="csr"))
    found = {name: layer for name, layer in sparse.named_modules() if isinstance(layer, SparseLinear)}
    assert len(found) == 4
    positions = {"0": 8 * 8, "2": 4 * 2, "4": 4 * 2, "6": 1}
    operations = count_operations(sparse, images)
    assert operations.macs == {f"{name}.values": layer.nnz * positions[name] for name, layer in found.items()}
    assert not operations.products
    assert not operations.warnings()
    # As the table says before the layers are swapped.
    densities = {f"{name}.weight": layer.nnz / layer.mask().numel() for name, layer in found.items()}
    for convention in CONVENTIONS:
        table = flops_table(dense, densities, convention=convention, backend="csr")
        assert table.executed == pytest.approx(flops_table(operations, {}, convention=convention).dense, rel=1e-12)
    # As torch counts a pass, and its backward pass, which costs twice as much but for the first layer's input.
    sparse.train()
    with FlopCounterMode(display=False) as counter:
        y = sparse(images)
    forward = 2 * batch * sum(operations.macs.values())
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.float().sum().backward()
    assert counter.get_total_flops() == 2 * forward - 2 * batch * operations.macs["0.values"]


def test_attention_scores_are_products_that_no_mask_makes_cheaper():
    class Functional(nn.Module):
        def forward(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    query, memory = torch.zeros(2, 5, 8), torch.zeros(2, 7, 8)
    for weights in (True, False):
        arguments = {"query": query, "key": memory, "value": memory, "need_weights": weights}
        operations = count_operations(nn.MultiheadAttention(8, 2, batch_first=True), arguments)
        assert operations.products == {"q·k": 5 * 7 * 8, "attn·v": 5 * 7 * 8}
    with_bias = nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True)  # length first
    operations = count_operations(with_bias, {"query": query, "key": query, "value": query}, batch_size=5)
    assert operations.products == {"q·k": 2 * 8 * 4, "attn·v": 2 * 8 * 4}
    heads = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 7, 4), torch.zeros(2, 3, 7, 6)
    assert count_operations(Functional(), heads).products == {"bmm": 3 * 5 * 7 * (4 + 6)}
    alike = [torch.zeros(2, 3, 5, 4)] * 3  # of shapes that fused attention takes
    assert count_operations(Functional(), alike) == Operations((), {"bmm": 3 * 5 * 5 * 8}, {}, ())

    table = flops_table(operations, {"in_proj_weight[q]": 0.5}, convention="macs", backend="csr")
    rows = {row.name: row for row in table.rows}
    assert rows["in_proj_weight[q]"].theoretical == rows["in_proj_weight[k]"].theoretical / 2
    assert rows["q·k"].dense == rows["q·k"].theoretical == rows["q·k"].executed == 64


def test_operators_outside_known_modules_are_attributed_or_listed():
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6, 4))
            self.scale = nn.Parameter(torch.ones(6))
            self.table = nn.Parameter(torch.zeros(9, 4))

        def forward(self, x):
            y = nn.functional.linear(x, self.weight) * self.scale
            y = y + torch.einsum("nld,ed->nle", x, self.weight)
            return torch.fft.fft(y, dim=-1).real.softmax(-1)

    model = nn.Sequential(nn.Linear(4, 4), Custom())
    operations = count_operations(model, torch.zeros(2, 5, 4))
    assert operations.macs == {"0.weight": 5 * 16, "1.weight": 2 * 5 * 24}
    assert [(w.label, w.outputs) for w in operations.weights] == [("0.weight", 20), ("1.weight", 60)]
    assert list(operations.unknown) == ["aten._fft_r2c in 1"]
    assert operations.unread == ("1.table",)
    fft, table = operations.warnings()
    assert "aten._fft_r2c in 1 ran 1×" in fft
    assert "1.table was read by no operator" in table
    assert fft in str(flops_table(operations, {}))


def test_custom_operators_and_subclasses_are_not_taken_for_free():
    @torch.library.custom_op("dst_tests::mystery", mutates_args=())
    def mystery(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight

    class LowRank(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.a, self.b = nn.Parameter(torch.zeros(4, 1)), nn.Parameter(torch.zeros(1, 4))

        def forward(self, x):
            return mystery(super().forward(x) + x @ self.a @ self.b + x @ x.mT, self.weight)

    operations = count_operations(LowRank(), torch.zeros(1, 4, 4))
    assert operations.macs == {"weight": 64, "a": 16, "b": 16}
    assert operations.products == {"bmm": 64}
    assert list(operations.unknown) == ["dst_tests.mystery"]


def test_common_networks_have_no_unknown_operator():
    transformer = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu"), 1)
    padded = {"src": torch.zeros(2, 5, 8), "src_key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)}
    features = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.PReLU(), nn.Upsample(scale_factor=2), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Dropout(), nn.Unflatten(1, (4, 8)), nn.LSTM(8, 4, batch_first=True),
    )  # fmt: skip
    for model, example in ((transformer, padded), (features, (3, 9, 9)), (WRN22_2((3, 32, 32), 10), (3, 32, 32))):
        operations = count_operations(model, example)
        assert operations.warnings() == [], type(model)
        assert operations.macs


def test_embeddings_are_listed_at_no_cost():
    operations = count_operations(nn.Embedding(10, 4), torch.zeros(1, 3, dtype=torch.long))
    assert operations.macs == {"weight": 0}
    assert operations.warnings() == []
    (row,) = flops_table(operations, {}, convention="rigl").rows
    assert row.dense == 0


def test_table_refuses_what_was_not_counted():
    operations = count_operations(nn.Linear(3, 5), (3,))
    for arguments, message in (
        (({"other": 0.5},), "other has a density"),
        (({"weight": 1.5},), "density of weight"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            flops_table(operations, *arguments)
    with pytest.raises(ConfigurationError, match="convention='flop' is unknown; choose from macs, flops, rigl"):
        flops_table(operations, {}, convention="flop")
    with pytest.raises(ConfigurationError, match="backend='dense' is unknown"):
        flops_table(operations, {}, backend="dense")
