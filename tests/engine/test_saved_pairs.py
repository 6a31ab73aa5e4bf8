"""Every reader of saved states and masks, with every backend and setting that writes them."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dst
from dst import methods
from dst.lightning import SparseTraining
from dst.lightning.recorder import Recorder, read_rows
from dst.report.inspection import inspect_checkpoint
from dst.types import Observer, Score
from tests.methods_list import METHODS
from tests.resume.fits import BATCHES, Fit


@pytest.mark.parametrize("backend", ["masked", "csr"])
def test_a_checkpoint_of_any_backend_is_inspected_alike(backend: str, tmp_path: Path) -> None:
    sparse = SparseTraining(methods.rigl(0.3, update_every=4, backend=backend))
    Fit(sparse, tmp_path, steps=BATCHES)
    sparsifier = sparse.sparsifier
    assert sparsifier is not None
    found = inspect_checkpoint(tmp_path / "last.ckpt")
    assert {x.name: x.active for x in found.layers} == {r["name"]: r["nonzero"] for r in sparsifier.layer_table()}
    assert found.facts["explored"] == f"{100 * sparsifier.exploration_rate:.2f}% of the weights of sparse layers"


def test_a_checkpoint_after_set_density_has_no_problem(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = dst.Sparsifier(model, optimizer, methods.sparse_from_scratch(0.5), total_steps=10)
    sparsifier.set_density(0.4)
    torch.save(sparsifier.state_dict(), tmp_path / "state.pt")
    found = inspect_checkpoint(tmp_path / "state.pt")
    assert found.target == 0.4
    assert not [line for line in found.problems() if "target" in line]


def test_masks_have_a_version_that_every_change_moves() -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = dst.Sparsifier(model, optimizer, methods.rigl(0.5, update_every=2), total_steps=20)
    seen, masks = [sparsifier.mask_version], sparsifier.masks
    for step in range(8):
        model(torch.randn(4, 40)).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        optimizer.zero_grad()
        if step == 4:
            sparsifier.set_density(0.2)
        same = all(torch.equal(m, masks[n]) for n, m in sparsifier.masks.items())
        assert same == (sparsifier.mask_version == seen[-1])
        seen.append(sparsifier.mask_version)
        masks = sparsifier.masks
    again = dst.Sparsifier(model, optimizer_of(model), methods.rigl(0.5, update_every=2), total_steps=20)
    again.load_state_dict(sparsifier.state_dict())
    assert again.mask_version == sparsifier.mask_version


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


def test_the_recorder_sees_a_density_that_was_set(tmp_path: Path) -> None:
    """Dead units are counted in the same masks as the active weights."""
    sparse = SparseTraining(methods.sparse_from_scratch(0.5))
    recorder = Recorder(tmp_path)

    class SetDensity(Recorder):
        def __init__(self) -> None:
            pass

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                assert sparse.sparsifier is not None
                sparse.sparsifier.set_density(0.02)

    from lightning.pytorch.callbacks import Callback

    change = type("Change", (Callback,), {"on_train_epoch_start": SetDensity.on_train_epoch_start})()
    Fit(sparse, tmp_path, callbacks=[sparse, change, recorder], steps=2 * BATCHES)
    assert sparse.sparsifier is not None
    masks = sparse.sparsifier.masks
    last = read_rows(tmp_path / "topology.jsonl")[-1]
    rows = [row for row in read_rows(tmp_path / "topology.jsonl") if "dead_outputs" in row]
    assert rows
    outputs = [int((~mask.flatten(1).any(1)).sum()) for mask in masks.values()]
    assert rows[-1]["dead_outputs"] == outputs
    assert max(outputs) > 0
    assert last["active"] == [int(mask.sum()) for mask in masks.values()]


# -- damaged states ------------------------------------------------------------------------------------------------


def _trained(name: str) -> dst.Sparsifier:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = dst.Sparsifier(model, optimizer, METHODS[name](), total_steps=24)
    for _ in range(6):
        model(torch.randn(4, 12)).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
        optimizer.zero_grad()
    return sparsifier


@pytest.mark.parametrize("name", ["rigl", "granet", "grown_warmup", "top_kast"])
def test_any_damage_of_a_state_is_a_state_error_and_changes_nothing(name: str, caplog: Any) -> None:
    caplog.set_level(logging.ERROR)
    sparsifier = _trained(name)
    state = sparsifier.state_dict()
    optional = {"settings", "budget_density", "budget_densities", "splits"}  # what other densities would come to
    for key in state:
        for wrong in (None, "text", 1.5, [None], {"a": None}, [], {}, -1):
            damaged = copy.deepcopy(state)
            damaged[key] = wrong
            before = sparsifier.state_dict()
            try:
                sparsifier.load_state_dict(damaged)
            except dst.StateError:
                pass
            else:
                # What was accepted is what such a state may hold: it comes out as it went in.
                assert key in optional or _plain(sparsifier.state_dict()[key]) == _plain(wrong), (key, wrong)
                sparsifier.load_state_dict(state)
                continue
            assert _plain(sparsifier.state_dict()) == _plain(before), (key, wrong)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


# -- what is accepted counts ---------------------------------------------------------------------------------------


def test_a_users_score_is_a_score() -> None:
    class Sensitivity:
        needs_gradient = True
        observes = False

        def __call__(self, view: Any) -> torch.Tensor:
            return (view.weight * view.gradient).abs()

    assert isinstance(Sensitivity(), Score)
    assert not isinstance(Sensitivity(), Observer)
    assert isinstance(dst.scores.Momentum(), Observer)


OTHER: dict[str, list[Any]] = {
    "update_every": [7], "start": [3], "stop": [0.5], "sparsify_at": [0.4], "density": [0.25], "backend": ["csr"],
    "allocation": [dst.allocation.PerLayer({"*": 0.1})], "init": [dst.init.Magnitude(), dst.init.Random()],
    "drop": [dst.scores.Momentum(0.3)], "grow": [dst.scores.Momentum(0.2)], "fraction": [dst.schedules.Linear(0.17)],
    "surplus": [dst.schedules.Linear(0.17)], "pattern": [dst.patterns.Neuron()],
    "schedule": [dst.schedules.Stepwise(((4, 0.2), (10, 0.1)), initial=0.25, stop=16)],
    "first_allocation": [dst.allocation.Uniform(dense_first=True)], "amount": [dst.amounts.BelowZero()],
    "redistribute": [dst.redistribute.Survivors(), dst.redistribute.MeanMomentum()], "temperature": [0.7],
    "match": ["flops"], "initial_density": [0.9], "backward_density": [0.6], "rewind": ["rate"], "threshold": [0.2],
    "penalty": [0.5],
}  # fmt: skip


def _others(name: str, default: Any) -> list[Any]:
    if name in OTHER:
        return OTHER[name]
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, int):
        return [default + 1]
    if isinstance(default, float):
        return [default * 0.9 if default else 0.1]
    raise AssertionError(f"say in OTHER what else {name}={default!r} may be")


@pytest.mark.parametrize("name", methods.__all__)
def test_every_parameter_of_a_method_counts(name: str) -> None:
    make = getattr(methods, name)
    plain = make().spec()
    for parameter in inspect.signature(make).parameters.values():
        if (name, parameter.name) == ("dense", "density"):
            continue  # sweeps over densities pass one to the baseline too
        specs = []
        for value in _others(parameter.name, parameter.default):
            with contextlib.suppress(dst.ConfigurationError):  # refused is not ignored
                specs.append(make(**{parameter.name: value}).spec())
        assert not specs or any(spec != plain for spec in specs), (
            f"{name}({parameter.name}=...) is accepted and ignored"
        )
