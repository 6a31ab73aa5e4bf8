"""Which weights can be sparse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dst.errors import ConfigurationError
from dst.topology.layers import find_layers


def labels(model, **selectors):
    return [layer.label for layer in find_layers(model, **selectors)[0]]


def reasons(model, **selectors):
    return {weight.name: weight.reason for weight in find_layers(model, **selectors)[1]}


@pytest.mark.parametrize(
    ("module", "shape", "output_dim"),
    [
        (nn.Linear(3, 5), (5, 3), 0),
        (nn.Conv1d(4, 6, 3, groups=2), (6, 2, 3), 0),
        (nn.Conv2d(4, 6, (3, 1)), (6, 4, 3, 1), 0),
        (nn.Conv3d(2, 3, 2), (3, 2, 2, 2, 2), 0),
        (nn.ConvTranspose1d(4, 6, 3), (4, 6, 3), 1),
        (nn.ConvTranspose2d(4, 6, 3), (4, 6, 3, 3), 1),
        (nn.ConvTranspose3d(4, 6, 3), (4, 6, 3, 3, 3), 1),
        (nn.Bilinear(2, 3, 4), (4, 2, 3), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_linear_and_convolutions(module, shape, output_dim):
    layers, dense = find_layers(nn.Sequential(module, nn.BatchNorm1d(4)))
    (layer,) = layers
    assert (layer.label, layer.parameter, layer.kind) == ("0.weight", "0.weight", type(module).__name__)
    assert (layer.shape, layer.output_dim, layer.rows) == (shape, output_dim, None)
    assert layer.weights == module.weight.numel()
    assert layer.part(module.weight) is module.weight
    assert dense == []


def test_attention_counts_as_three_and_its_bias_rows_stay_dense():
    model = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    layers, dense = find_layers(model)
    assert [layer.label for layer in layers] == [
        "in_proj_weight[q]",
        "in_proj_weight[k]",
        "in_proj_weight[v]",
        "out_proj.weight",
    ]
    assert [layer.shape for layer in layers] == [(8, 8)] * 4
    assert [layer.rows for layer in layers] == [(0, 8), (8, 16), (16, 24), None]
    assert {layer.parameter for layer in layers} == {"in_proj_weight", "out_proj.weight"}
    whole = torch.arange(24 * 8).view(24, 8)
    assert torch.equal(torch.cat([layer.part(whole) for layer in layers[:3]]), whole)
    assert {weight.name: weight.reason for weight in dense} == {"bias_k": "bias", "bias_v": "bias"}


def test_attention_with_separate_projections():
    layers, _ = find_layers(nn.MultiheadAttention(8, 2, kdim=4, vdim=6))
    assert [(layer.label, layer.shape) for layer in layers] == [
        ("q_proj_weight", (8, 8)),
        ("k_proj_weight", (8, 4)),
        ("v_proj_weight", (8, 6)),
        ("out_proj.weight", (8, 8)),
    ]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LSTM(3, 4), {"weight_ih_l0": (16, 3), "weight_hh_l0": (16, 4)}),
        (nn.LSTM(3, 4, proj_size=2), {"weight_ih_l0": (16, 3), "weight_hh_l0": (16, 2), "weight_hr_l0": (2, 4)}),
        (nn.GRU(3, 4), {"weight_ih_l0": (12, 3), "weight_hh_l0": (12, 4)}),
        (
            nn.RNN(3, 4, bidirectional=True),
            {
                "weight_ih_l0": (4, 3),
                "weight_hh_l0": (4, 4),
                "weight_ih_l0_reverse": (4, 3),
                "weight_hh_l0_reverse": (4, 4),
            },
        ),
        (nn.LSTMCell(3, 4), {"weight_ih": (16, 3), "weight_hh": (16, 4)}),
        (nn.GRUCell(3, 4), {"weight_ih": (12, 3), "weight_hh": (12, 4)}),
        (nn.RNNCell(3, 4), {"weight_ih": (4, 3), "weight_hh": (4, 4)}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_recurrent_weights(module, expected):
    assert {layer.label: layer.shape for layer in find_layers(module)[0]} == expected


def test_norms_biases_and_embeddings_stay_dense_unless_included():
    model = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm((2, 4)), nn.Linear(4, 3))
    assert labels(model) == ["2.weight"]
    assert reasons(model) == {
        "0.weight": "embedding",
        "1.weight": "LayerNorm is not a known layer (use include= to make it sparse)",
        "1.bias": "bias",
    }
    assert labels(model, include=[nn.Embedding]) == ["0.weight"]
    assert labels(model, include=["0.weight", "2"]) == ["0.weight", "2.weight"]
    assert labels(model, include=["1.*", "2.*"]) == ["1.weight", "1.bias", "2.weight"]
    assert labels(nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 3))) == ["1.weight"]


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4))
        self.linear = nn.Linear(4, 4)


def test_parameters_of_custom_modules_are_sparse_only_by_name():
    assert labels(Custom()) == ["linear.weight"]
    assert labels(Custom(), include=["table", "linear.weight"]) == ["table", "linear.weight"]


class Tied(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second, self.body = first, second, nn.Linear(4, 4)
        self.second.weight = self.first.weight


def test_tied_weights_count_once():
    model = Tied(nn.Linear(4, 6), nn.Linear(4, 6))
    assert labels(model) == ["first.weight", "body.weight"]
    assert labels(model, exclude=["second"]) == ["body.weight"]
    assert labels(model, exclude=["second.weight"]) == ["body.weight"]


def test_a_head_tied_to_an_embedding_stays_dense_unless_included():
    model = Tied(nn.Embedding(6, 4), nn.Linear(4, 6))
    assert labels(model) == ["body.weight"]
    assert reasons(model) == {"first.weight": "tied to an embedding"}
    assert labels(Tied(nn.Linear(4, 6), nn.Embedding(6, 4))) == ["body.weight"]
    assert labels(model, include=["second.weight"]) == ["first.weight"]


def test_frozen_weights_stay_dense():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    assert labels(model) == ["1.weight"]
    assert reasons(model, include=["0", "1"]) == {"0.weight": "frozen (requires_grad=False)"}


@pytest.fixture
def network():
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 4, 3),
            "body": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
            "attention": nn.MultiheadAttention(4, 1),
            "head": nn.Linear(4, 2),
        }
    )


EVERYTHING = [
    "stem.weight",
    "body.0.weight",
    "body.1.weight",
    *(f"attention.in_proj_weight[{part}]" for part in "qkv"),
    "attention.out_proj.weight",
    "head.weight",
]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, EVERYTHING),
        (["head"], None, ["head.weight"]),
        (["head.weight"], None, ["head.weight"]),
        (["body.*"], None, ["body.0.weight", "body.1.weight"]),
        (["body.?.weight", nn.Conv2d], None, ["stem.weight", "body.0.weight", "body.1.weight"]),
        ([nn.Linear], ["head"], ["body.0.weight", "body.1.weight", "attention.out_proj.weight"]),
        (None, ["attention*", "body*"], ["stem.weight", "head.weight"]),
        (None, [nn.Linear, nn.MultiheadAttention], ["stem.weight"]),
        (["attention.in_proj_weight"], ["attention.in_proj_weight[v]"], EVERYTHING[3:5]),
        (None, [], EVERYTHING),
    ],
)
def test_selection_by_name_pattern_and_type(network, include, exclude, expected):
    assert labels(network, include=include, exclude=exclude) == expected


@pytest.mark.parametrize(
    ("selectors", "named"),
    [
        ({"include": ["head", "tail"]}, "tail"),
        ({"exclude": ["bodies.*"]}, r"bodies\.\*"),
        ({"exclude": [nn.LSTM]}, "LSTM"),
        ({"exclude": ["head.bias"]}, r"head\.bias"),
    ],
)
def test_selectors_that_select_nothing_are_refused(network, selectors, named):
    with pytest.raises(
        ConfigurationError, match=f"include/exclude {named} selects no weight; the weights are stem.weight"
    ):
        find_layers(network, **selectors)


@pytest.mark.parametrize("selectors", [{"include": "head"}, {"exclude": "head"}, {"exclude": nn.Linear}])
def test_a_single_selector_must_be_in_a_list(network, selectors):
    with pytest.raises(ConfigurationError, match="must be a list"):
        find_layers(network, **selectors)


def test_a_lazy_module_must_have_seen_data():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(ConfigurationError, match=r"0\.weight has no shape yet.*one batch"):
        find_layers(model)
    model(torch.randn(2, 3))
    assert labels(model) == ["0.weight", "1.weight"]


@pytest.mark.parametrize(
    ("model", "selectors", "reason"),
    [
        (nn.Embedding(3, 4), {}, "weight: embedding"),
        (nn.LayerNorm(4), {}, "no weight with two dimensions"),
        (nn.Linear(3, 4), {"exclude": ["weight"]}, "weight: excluded"),
    ],
)
def test_a_model_without_sparse_layers_is_refused(model, selectors, reason):
    with pytest.raises(ConfigurationError, match=f"nothing in {type(model).__name__} can be sparse.*{reason}"):
        find_layers(model, **selectors)
