"""Recurrent models: against the cell by hand, and their weights as sparse layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dst
from dst.errors import ConfigurationError
from dst.metrics.counting import layer_macs
from dst.models import GRUCharModel, GRUClassifier
from tests.metrics.uncounted import uncounted


def test_reads_an_image_row_by_row():
    model = GRUClassifier((2, 5, 3), 4, width=6)
    images = torch.randn(3, 2, 5, 3)
    weights = dict(model.recurrent.named_parameters())
    state = torch.zeros(3, 6)
    for row in range(5):
        inputs = torch.cat([images[:, 0, row], images[:, 1, row]], 1)
        # Cho et al. 2014 in PyTorch's form: reset, update and new gates lie below each other.
        read = (inputs @ weights["weight_ih_l0"].T + weights["bias_ih_l0"]).chunk(3, 1)
        kept = (state @ weights["weight_hh_l0"].T + weights["bias_hh_l0"]).chunk(3, 1)
        reset, update = (read[0] + kept[0]).sigmoid(), (read[1] + kept[1]).sigmoid()
        state = (1 - update) * (read[2] + reset * kept[2]).tanh() + update * state
    torch.testing.assert_close(model(images), model.classifier(state))


def test_the_character_model_sees_earlier_characters_alone():
    model = GRUCharModel(9, 7, width=8, depth=2)
    tokens = torch.randint(9, (2, 7))
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 9
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 7, 9)
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).any(2).all()


def test_cost_counts_every_row():
    classifier = GRUClassifier((1, 8, 8), 10, width=6, depth=2)
    macs = layer_macs(classifier, (1, 8, 8))
    assert uncounted(classifier, macs) == []
    assert macs["recurrent.weight_ih_l0"] == 3 * 6 * 8 * 8
    assert macs["recurrent.weight_hh_l1"] == 3 * 6 * 6 * 8
    assert macs["classifier.weight"] == 60
    character = GRUCharModel(9, 7, width=8)
    macs = layer_macs(character, torch.zeros(1, 7, dtype=torch.int64))
    assert uncounted(character, macs) == []
    assert macs["recurrent.weight_hh_l0"] == 3 * 8 * 8 * 7
    assert macs["head.weight"] == 9 * 8 * 7


@pytest.mark.parametrize("backend", ["masked", "csr"])
def test_recurrent_weights_are_sparse_with_one_budget_for_all_gates(backend):
    torch.manual_seed(0)
    model = GRUClassifier((1, 8, 8), 10, width=16)
    method = dst.methods.rigl(0.2, update_every=2, backend=backend)
    planned = {row.name: row.active for row in dst.plan(model, method).rows}
    model = dst.prepare(model, method)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=40)
    gates = [[int(gate.sum()) for gate in sparsifier.masks["recurrent.weight_hh_l0"].chunk(3)]]
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(16, 1, 8, 8)), torch.randint(10, (16,))).backward()
        sparsifier.before_step()
        optimizer.step()
        mask = sparsifier.masks["recurrent.weight_hh_l0"]
        assert int(mask.sum()) == planned["recurrent.weight_hh_l0"]
        assert not dst.dense_state_dict(model)["recurrent.weight_hh_l0"][~mask].any()
        gates.append([int(gate.sum()) for gate in mask.chunk(3)])
    assert sparsifier.updates >= 5
    assert gates[-1] != gates[0]  # connections have moved between gates
    assert {row["name"]: row["nonzero"] for row in sparsifier.layer_table()} == planned


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GRUClassifier((1, 8, 8), 10, width=0), "width must be"),
        (lambda: GRUClassifier((1, 8, 8), 10, depth=0), "depth must be"),
        (lambda: GRUCharModel(1, 8), "vocab_size must be at least 2"),
        (lambda: GRUCharModel(5, 0), "context must be"),
    ],
)
def test_refuses_what_is_out_of_range(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()
