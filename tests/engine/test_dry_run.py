"""The dry run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dst
from dst import methods
from dst.allocation import Uniform
from dst.errors import ConfigurationError
from tests.small import Small


def test_a_plan_says_what_the_sparsifier_will_do():
    model = Small()
    method = methods.rigl(0.3)
    plan = dst.plan(model, method, exclude=["head"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=10, exclude=["head"])
    rows = [r for r in plan.rows if not r.note.startswith("dense: ")]
    table = [{"name": r.name, "shape": list(r.shape), "weights": r.weights, "nonzero": r.active} for r in rows]
    expected = [{k: line[k] for k in ("name", "shape", "weights", "nonzero")} for line in sparsifier.layer_table()]
    assert table == expected
    (excluded,) = [r for r in plan.rows if r not in rows]
    assert (excluded.name, excluded.note, excluded.active, excluded.weights) == (
        "head.weight",
        "dense: excluded",
        60,
        60,
    )


def test_a_plan_needs_no_storage_and_changes_nothing():
    with torch.device("meta"):
        model = Small()
    meta = dst.plan(model, methods.rigl(0.3))
    real = Small()
    before = {k: v.clone() for k, v in real.state_dict().items()}
    assert dst.plan(real, methods.rigl(0.3)) == meta
    assert all(torch.equal(before[k], v) for k, v in real.state_dict().items())


def test_a_plan_prints_as_a_table():
    model = nn.Sequential(nn.Embedding(100, 20), nn.Linear(20, 50), nn.Linear(50, 2))
    lines = str(dst.plan(model, methods.rigl(0.1, allocation=Uniform()))).splitlines()
    assert lines[0].split() == ["weight", "module", "shape", "weights", "active", "density", "storage"]
    assert lines[1].split() == ["1.weight", "Linear", "50×20", "1,000", "100", "0.1000", "masked"]
    assert lines[2].split() == ["2.weight", "Linear", "2×50", "100", "10", "0.1000", "masked"]
    assert lines[3].split() == [
        "0.weight",
        "Embedding",
        "100×20",
        "2,000",
        "2,000",
        "1.0000",
        "dense",
        "dense:",
        "embedding",
    ]
    assert len(lines) == 4


def test_layers_that_erk_leaves_dense_are_marked():
    plan = dst.plan(nn.Sequential(nn.Linear(2, 1), nn.Linear(100, 100)), methods.rigl(0.1))
    assert [row.note for row in plan.rows] == ["stays dense", ""]


def test_layers_that_scores_decide_are_marked():
    plan = dst.plan(Small(), methods.static(0.1))
    assert all(row.active is None for row in plan.rows)
    assert str(plan).count("by score") == len(plan.rows)
    assert [r.active for r in dst.plan(nn.Linear(4, 3), methods.dense()).rows] == [12]


def test_a_plan_refuses_what_the_sparsifier_refuses():
    with pytest.raises(ConfigurationError, match="selects no weight"):
        dst.plan(Small(), methods.rigl(0.1), include=["nothing"])
    with pytest.raises(ConfigurationError, match="no density is given"):
        dst.plan(Small(), methods.rigl(0.1, allocation=dst.allocation.PerLayer({"head*": 0.1})))
    with pytest.raises(ConfigurationError, match="keeps 2 weights for 3 layers"):
        dst.plan(nn.Sequential(*(nn.Linear(10, 10) for _ in range(3))), methods.static(0.005))
