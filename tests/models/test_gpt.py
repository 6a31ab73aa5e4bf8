"""The decoder: GPT-2's size and start, causality, tying, what it learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dst.errors import ConfigurationError
from dst.metrics.counting import layer_macs
from dst.models import GPT
from dst.topology.layers import find_layers
from tests.metrics.uncounted import uncounted

SMALL = {"width": 16, "depth": 2, "heads": 2}


def test_published_size():
    # GPT-2 of Radford et al. 2019, as released: 124,439,808 parameters.
    with torch.device("meta"):
        model = GPT(50_257, 1024, width=768, depth=12, heads=12, tied=True)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_starts_at_chance_with_small_residual_layers():
    model = GPT(40, 16, width=64, depth=8, heads=4)
    tokens = torch.randint(40, (8, 16))
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), torch.randint(40, (128,)))
    assert loss.item() == pytest.approx(math.log(40), rel=0.05)
    block = model.blocks[3]
    for small in (block.attention.out, block.feed_forward.project):
        assert small.weight.std().item() == pytest.approx(block.attention.query.weight.std().item() / 4, rel=0.1)


def test_a_token_sees_itself_and_earlier_ones():
    model = GPT(11, 8, **SMALL)
    tokens = torch.randint(11, (2, 8))
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any(2).all()
    torch.testing.assert_close(model(tokens[:, :3]), before[:, :3])


def test_trains_every_parameter_and_learns_a_sequence():
    torch.manual_seed(0)
    model = GPT(11, 8, **SMALL)
    tokens = torch.randint(11, (4, 9))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if not name.endswith("key.bias"))
    assert loss.item() < 0.2


def test_the_head_is_sparse_unless_it_is_tied():
    free, tied = GPT(11, 8, **SMALL), GPT(11, 8, tied=True, **SMALL)
    assert len(find_layers(free)[0]) == 2 * 6 + 1
    assert {d.name: d.reason for d in find_layers(free)[1]} == {
        "tokens.weight": "embedding",
        "positions.weight": "embedding",
    }
    layers, dense = find_layers(tied)
    assert len(layers) == 2 * 6
    assert dense[0].reason == "tied to an embedding"
    assert tied.head.weight is tied.tokens.weight


def test_cost():
    model = GPT(11, 8, **SMALL)
    macs = layer_macs(model, torch.zeros(1, 8, dtype=torch.int64))
    assert uncounted(model, macs) == []
    assert macs["tokens.weight"] == 0
    assert macs["blocks.0.attention.value.weight"] == 16 * 16 * 8
    assert macs["blocks.1.feed_forward.project.weight"] == 64 * 16 * 8
    assert macs["head.weight"] == 11 * 16 * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 15}, "width=15 must be a multiple of heads=2"),
        ({"vocab_size": 1}, "vocab_size must be at least 2"),
        ({"context": 0}, "context must be an integer"),
        ({"dropout": -0.1}, "dropout must lie"),
        ({"experts": 1}, "experts=1 must be"),
        ({"expert_every": 0}, "expert_every must be"),
    ],
)
def test_refuses_what_is_out_of_range(options, message):
    with pytest.raises(ConfigurationError, match=message):
        GPT(**{"vocab_size": 11, "context": 8, **SMALL, "expert_every": 1, **options})


def test_refuses_sequences_that_are_too_long():
    with pytest.raises(ConfigurationError, match="9 tokens is longer than the context of 8"):
        GPT(11, 8, **SMALL)(torch.zeros(1, 9, dtype=torch.int64))
