"""The vision transformer: published size, patches, attention against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dst.errors import ConfigurationError
from dst.metrics.counting import layer_macs
from dst.models import ViTTiny
from dst.models.transformer import Attention, init_transformer
from dst.topology.layers import find_layers
from tests.metrics.uncounted import uncounted

SMALL = {"width": 12, "depth": 2, "heads": 3}


def test_published_size():
    # DeiT-Ti (Touvron et al. 2021) has 5,717,416 parameters, of which 2·192 are a class token and its position.
    with torch.device("meta"):
        model = ViTTiny((3, 224, 224), 1000, patch=16)
    assert sum(p.numel() for p in model.parameters()) == 5_717_416 - 2 * 192


@pytest.mark.parametrize(
    ("shape", "patch", "tokens"),
    [((3, 32, 32), 4, 64), ((1, 28, 28), 4, 49), ((1, 8, 8), 2, 16), ((1, 6, 6), 1, 36), ((2, 9, 14), 1, 126),
     ((1, 2, 2), 1, 4), ((1, 16, 18), 2, 72)],
)  # fmt: skip
def test_the_patch_suits_the_image(shape, patch, tokens):
    model = ViTTiny(shape, 5, **SMALL)
    assert (model.patch, model.positions.num_embeddings) == (patch, tokens)
    assert model(torch.randn(2, *shape)).shape == (2, 5)


def test_trains_every_parameter_and_tells_positions_apart():
    model = ViTTiny((1, 8, 8), 5, **SMALL)
    images = torch.randn(3, 1, 8, 8)
    nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 4])).backward()
    # A bias of the keys shifts all of a query's logits alike.
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if not name.endswith("key.bias"))
    turned = images.view(3, 1, 4, 2, 8).flip(2).view(3, 1, 8, 8)  # the same patches elsewhere
    assert not torch.allclose(model(images), model(turned), atol=1e-6)
    with torch.no_grad():
        model.positions.weight.zero_()
    torch.testing.assert_close(model(images), model(turned))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_pytorchs_with_separate_projections(causal):
    torch.manual_seed(0)
    ours, theirs = Attention(12, 3, causal=causal), nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        for bias in ("query", "key", "value", "out"):
            getattr(ours, bias).bias.normal_()
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    tokens = torch.randn(2, 5, 12)
    mask = nn.Transformer.generate_square_subsequent_mask(5) if causal else None
    expected, _ = theirs(tokens, tokens, tokens, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(ours(tokens), expected)


def test_what_is_sparse_and_what_it_costs():
    model = ViTTiny((1, 8, 8), 5, **SMALL)
    layers, dense = find_layers(model)
    assert len(layers) == 2 + 2 * 6
    assert {weight.name: weight.reason for weight in dense} == {"positions.weight": "embedding"}
    macs = layer_macs(model, (1, 8, 8))
    assert uncounted(model, macs) == []
    assert macs["embed.weight"] == 12 * 4 * 16
    assert macs["blocks.1.attention.key.weight"] == 12 * 12 * 16
    assert macs["blocks.0.feed_forward.expand.weight"] == 12 * 48 * 16
    assert macs["classifier.weight"] == 12 * 5


def test_dropout_acts_in_training_only():
    model = ViTTiny((1, 8, 8), 5, dropout=0.5, **SMALL)
    images = torch.randn(2, 1, 8, 8)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_initialisation():
    layer = nn.Linear(300, 300)
    init_transformer(layer, std=0.02)
    assert layer.weight.abs().max() <= 0.04
    assert layer.weight.std().item() == pytest.approx(0.02 * 0.8796, rel=0.02)  # of a normal cut at two deviations
    assert torch.equal(layer.bias, torch.zeros(300))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 3}, "patch=3 does not divide images of 8x8"),
        ({"patch": 16}, "patch=16 does not divide"),
        ({"patch": 0}, "patch must be an integer"),
        ({"width": 10}, "width=10 must be a multiple of heads=3"),
        ({"depth": 0}, "depth must be an integer"),
        ({"dropout": 1.0}, "dropout must lie"),
        ({"mlp_ratio": 0}, "mlp_ratio must be"),
    ],
)
def test_refuses_what_is_out_of_range(options, message):
    with pytest.raises(ConfigurationError, match=message):
        ViTTiny((1, 8, 8), 5, **{**SMALL, **options})
