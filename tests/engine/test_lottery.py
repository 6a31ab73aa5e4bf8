"""Lottery tickets: densities, pruning, rewinding, and levels that are interrupted and resumed."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from torch import nn

from dst import ConfigurationError, StateError, load_masks, methods
from dst.allocation import ERK, Global, Uniform
from dst.data import Digits
from dst.engine.lottery import level_densities, prune, rewind, rewind_rates
from dst.lightning.lottery_levels import run_lottery
from dst.models.classifier import Classifier, cosine
from dst.topology.layers import find_layers
from tests.checks import check_density, equal
from tests.sampling import rotated
from tests.small import Small

# --- levels ---------------------------------------------------------------------------------------------------------


def test_densities_of_a_tenth():
    expected = [1.0, 0.8, 0.64, 0.512, 0.4096, 0.32768, 0.262144, 0.2097152, 0.16777216, 0.134217728, 0.1073741824, 0.1]
    assert level_densities(0.1) == pytest.approx(expected)
    assert len(level_densities(0.1)) == 12
    assert level_densities(0.1)[-1] == 0.1


@pytest.mark.parametrize(
    ("density", "fraction", "expected"),
    [
        (1.0, 0.2, [1.0]),
        (0.9, 0.2, [1.0, 0.9]),
        (0.8, 0.2, [1.0, 0.8]),
        (0.512, 0.2, [1.0, 0.8, 0.64, 0.512]),
        (0.25, 0.5, [1.0, 0.5, 0.25]),
        (0.2, 0.9, [1.0, 0.2]),
        (0.03, None, [1.0, 0.03]),
        (1.0, None, [1.0]),
    ],
)
def test_the_last_level_has_the_density_exactly(density, fraction, expected):
    densities = level_densities(density, fraction)
    assert densities == pytest.approx(expected)
    assert densities[-1] == density


@given(st.floats(0.01, 1), st.floats(0.05, 0.9))
def test_densities_decrease_by_at_most_the_fraction(density, fraction):
    densities = level_densities(density, fraction)
    assert densities[0] == 1
    assert densities[-1] == density
    for before, after in pairwise(densities):
        assert before > after >= before * (1 - fraction) * (1 - 1e-6)


@pytest.mark.parametrize("allocation", [Global(), Uniform(), ERK()])
def test_pruning_takes_a_subset_with_exact_counts(allocation):
    model = Small()
    layers, _ = find_layers(model)
    weights = {layer.parameter: model.get_parameter(layer.parameter) for layer in layers}
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    for density in level_densities(0.1)[1:]:
        before = {name: mask.clone() for name, mask in masks.items()}
        following = prune(layers, weights, masks, density, allocation)
        assert all(torch.equal(masks[n], before[n]) for n in masks)  # the level's own masks are not touched
        for layer in layers:
            old, new = layer.part(before[layer.parameter]), layer.part(following[layer.parameter])
            score = layer.part(weights[layer.parameter]).abs()
            assert not (new & ~old).any()
            assert new.any()
            pruned = old & ~new
            if pruned.any():
                assert score[pruned].max() <= score[new].min()
        if isinstance(allocation, Global):
            total = sum(layer.weights for layer in layers)
            check_density(sum(int(m.sum()) for m in following.values()), density, total)
        masks = following


def test_pruned_weights_never_come_back_whatever_they_have_become():
    model = nn.Linear(10, 10)
    layers, _ = find_layers(model)
    mask = torch.rand(10, 10) < 0.5
    mask[0] = True
    weight = torch.where(mask, 0.0, 100.0)  # pruned ones large, remaining ones zero
    density = (int(mask.sum()) - 5) / 100
    following = prune(layers, {"weight": weight}, {"weight": mask}, density, Global())["weight"]
    assert int(following.sum()) == int(mask.sum()) - 5
    assert not (following & ~mask).any()


def test_pruned_weights_take_no_budget_from_other_layers():
    """The first layer has ten weights of 2 left, and ninety pruned ones at 100: the twenty smallest are in the second."""
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    layers, _ = find_layers(model)
    left = torch.eye(10).bool()
    second = torch.linspace(0.1, 1, 100).view(10, 10)
    weights = {"0.weight": torch.where(left, 2.0, 100.0), "1.weight": second}
    masks = {"0.weight": left, "1.weight": torch.ones(10, 10).bool()}
    following = prune(layers, weights, masks, 90 / 200, Global())
    assert torch.equal(following["0.weight"], left)
    assert torch.equal(following["1.weight"].flatten(), torch.arange(100) >= 20)


def test_ties_are_broken_by_the_seed():
    model = nn.Linear(10, 10)
    layers, _ = find_layers(model)
    weights, masks = {"weight": torch.ones(10, 10)}, {"weight": torch.ones(10, 10).bool()}
    first, same, other = (prune(layers, weights, masks, 0.5, Uniform(), seed=s)["weight"] for s in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_more_than_a_level_has_left_is_refused():
    model = nn.Linear(10, 10)
    layers, _ = find_layers(model)
    masks = {"weight": torch.eye(10).bool()}
    with pytest.raises(ValueError, match="cannot select 50 of 10"):
        prune(layers, {"weight": model.weight}, masks, 0.5, Uniform())


def test_rewinding_restores_everything_but_what_is_pruned():
    model = Small()
    snapshot = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    mask = torch.rand(20, 8) < 0.5
    rewind(model, snapshot, {"hidden.weight": mask})
    for name, value in model.state_dict().items():
        expected = snapshot[name] * mask if name == "hidden.weight" else snapshot[name]
        assert torch.equal(value, expected)


# --- runs -----------------------------------------------------------------------------------------------------------

EPOCHS, BATCH, STEPS_PER_EPOCH = 3, 256, 5


class Power(Callback):
    """Interrupts once, at a given moment of a level."""

    def __init__(self) -> None:
        self.cut_at: tuple[int, int | str] | None = None
        self.level = 0
        self.started: list[tuple[int, int]] = []
        self.steps: list[int] = []

    def _maybe(self, moment: int | str) -> None:
        if self.cut_at == (self.level, moment):
            self.cut_at = None
            raise RuntimeError("power cut")

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.started.append((self.level, trainer.global_step))

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self._maybe(trainer.global_step)

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        self._maybe("fit end")


def module_of(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))
    return Classifier(network, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3), cosine)


def run(folder: Path, power: Power | None = None, *, seed: int = 0, method=None, **settings: Any):
    power = power or Power()
    method = method or methods.lottery_ticket_rewind(0.6, **settings)

    def make_trainer(level: int, callbacks: list[Callback], place: Path) -> lightning.Trainer:
        power.level = level
        return lightning.Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS,
            callbacks=[*callbacks, power],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=1,
            num_sanity_val_steps=0,
        )

    module = module_of(seed)
    result = run_lottery(method, make_trainer, module, Digits(batch_size=BATCH), folder=folder)
    return module, result, power


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if name.startswith("model.")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run: levels 1.0, 0.8, 0.64 and 0.6, rewound to step 4."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("finished")
    module, result, power = run(folder, rewind_to=4)
    return folder, module, result, power


def test_every_level_is_a_fit_from_the_rewind_point(finished):
    folder, module, result, power = finished
    assert [r.density for r in result.levels] == pytest.approx([1.0, 0.8, 0.64, 0.6])
    assert power.started == [(0, 0), (1, 4), (2, 4), (3, 4)]
    steps = EPOCHS * STEPS_PER_EPOCH
    assert [r.steps for r in result.levels] == [steps, steps - 4, steps - 4, steps - 4]
    assert [r.level for r in result.levels] == [0, 1, 2, 3]
    assert result.levels[0].step_counts == {"dense": steps, "sparse": 0, "dense_gradient": 0}
    assert result.levels[3].step_counts == {"dense": 0, "sparse": steps - 4, "dense_gradient": 0}
    assert equal(weights_in(folder / "level_03" / "final.ckpt"), dict(_model_state(module)))
    assert all(0 < r.metrics["val/accuracy"] <= 1 for r in result.levels)


def _model_state(module):
    return {name: value for name, value in module.state_dict().items() if name.startswith("model.")}


def test_counts_are_exact_and_masks_are_nested(finished):
    folder, _, result, _ = finished
    total = 64 * 12 + 12 * 10
    previous = None
    for level, outcome in enumerate(result.levels[1:], start=1):
        masks = load_masks(folder / f"level_{level:02d}" / "masks.pt")
        kept = sum(int(mask.sum()) for mask in masks.values())
        assert kept == sum(line["nonzero"] for line in outcome.layers)
        check_density(kept, outcome.density, total)
        final = weights_in(folder / f"level_{level:02d}" / "final.ckpt")
        trained = weights_in(folder / f"level_{level - 1:02d}" / "final.ckpt")
        survivors, pruned = [], []
        for name, mask in masks.items():
            assert not final[name][~mask].any()
            before = torch.ones_like(mask) if previous is None else previous[name]
            assert not (mask & ~before).any()
            survivors.append(trained[name][mask].abs())
            pruned.append(trained[name][before & ~mask].abs())
        assert torch.cat(pruned).max() <= torch.cat(survivors).min()
        previous = masks
    assert sum(line["nonzero"] for line in result.levels[-1].layers) == 533


def test_levels_start_from_the_snapshots_weights(finished, tmp_path):
    folder, *_ = finished
    snapshot = torch.load(folder / "snapshot.ckpt", weights_only=True)
    assert snapshot["global_step"] == 4
    assert snapshot["callbacks"] == {}
    seen = {}

    class See(Power):
        def on_train_start(self, trainer, module):
            seen[self.level] = {k: v.clone() for k, v in _model_state(module).items()}
            super().on_train_start(trainer, module)

    run(tmp_path, See(), rewind_to=4)
    masks = load_masks(tmp_path / "level_02" / "masks.pt")
    for name, value in seen[2].items():
        assert torch.equal(value, snapshot["state_dict"][name] * masks.get(name, 1)), name


@pytest.mark.parametrize(
    "rewind_to", [0, STEPS_PER_EPOCH, 7, 0.5, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (4, 10))]
)
def test_a_level_that_prunes_nothing_repeats_the_dense_level_to_the_bit(tmp_path, rewind_to):
    """Weights, momentum, learning rate, batch statistics and the order of the data are those of the rewind point."""
    _, result, power = run(tmp_path, method=methods.lottery_ticket_rewind(1 - 1e-9, rewind_to=rewind_to))
    step = rewind_to if isinstance(rewind_to, int) else 8
    assert power.started == [(0, 0), (1, step)]
    assert all(mask.all() for mask in load_masks(tmp_path / "level_01" / "masks.pt").values())
    assert equal(weights_in(tmp_path / "level_00" / "final.ckpt"), weights_in(tmp_path / "level_01" / "final.ckpt"))
    assert result.levels[1].metrics == result.levels[0].metrics


@pytest.mark.parametrize(
    "moment",
    [
        *[(0, 2), (0, "fit end"), (1, 2 * STEPS_PER_EPOCH), (2, "fit end"), (3, 15)],
        *(pytest.param(moment, marks=pytest.mark.exhaustive) for moment in ((0, 9), (1, 5), (1, 8), (2, 13))),
    ],
    ids=str,
)
def test_an_interrupted_run_resumes_exactly(finished, tmp_path, moment):
    reference, _, expected, _ = finished
    power = Power()
    power.cut_at = moment
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, power, rewind_to=4)
    level = moment[0]
    assert not (tmp_path / f"level_{level:02d}" / "level.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/level.json")}
    assert len(kept) == level
    # A new process initialises the module in the same way before level 0, and in whatever way later on.
    module, result, again = run(tmp_path, seed=0 if level == 0 else 5, rewind_to=4)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept  # finished levels were not repeated
    assert all(started >= level for started, _ in again.started)
    for number in range(4):
        place = f"level_{number:02d}"
        assert equal(weights_in(tmp_path / place / "final.ckpt"), weights_in(reference / place / "final.ckpt"))
        if number:
            assert equal(load_masks(tmp_path / place / "masks.pt"), load_masks(reference / place / "masks.pt"))
    assert [(r.steps, r.step_counts, r.layers) for r in result.levels] == [
        (r.steps, r.step_counts, r.layers) for r in expected.levels
    ]
    if moment[1] != "fit end":  # a fit that was complete has nothing left to measure
        assert [r.metrics for r in result.levels] == [r.metrics for r in expected.levels]
    assert equal(_model_state(module), weights_in(reference / "level_03" / "final.ckpt"))


def test_an_interrupted_level_resumes_from_its_last_checkpoint(tmp_path):
    power = Power()
    power.cut_at = (1, 13)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, power, rewind_to=4)
    _, _, again = run(tmp_path, seed=5, rewind_to=4)
    assert again.started == [(1, 2 * STEPS_PER_EPOCH), (2, 4), (3, 4)]


def test_a_first_level_interrupted_before_its_first_checkpoint_starts_over_with_its_snapshot(tmp_path):
    """The module of the second attempt is another one: the old snapshot is not its own."""
    power = Power()
    power.cut_at = (0, 5)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, power, seed=0, method=methods.lottery_ticket_rewind(1 - 1e-9, rewind_to=4))
    run(tmp_path, seed=5, method=methods.lottery_ticket_rewind(1 - 1e-9, rewind_to=4))
    assert equal(weights_in(tmp_path / "level_00" / "final.ckpt"), weights_in(tmp_path / "level_01" / "final.ckpt"))


def test_a_finished_run_is_read_and_not_repeated(finished):
    folder, _, expected, _ = finished
    module, result, power = run(folder, seed=5, rewind_to=4)
    assert power.started == []
    assert result.levels == expected.levels
    assert equal(_model_state(module), weights_in(folder / "level_03" / "final.ckpt"))


def test_density_one_is_only_the_dense_level(tmp_path):
    _, result, power = run(tmp_path, method=methods.lottery_ticket_rewind(1.0))
    assert [r.density for r in result.levels] == [1.0]
    assert power.started == [(0, 0)]
    record = json.loads((tmp_path / "level_00" / "level.json").read_text())
    assert record["steps"] == EPOCHS * STEPS_PER_EPOCH


def test_a_rewind_point_beyond_the_training_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="rewind_to=15"):
        run(tmp_path, rewind_to=EPOCHS * STEPS_PER_EPOCH)
    with pytest.raises(ConfigurationError, match="rewind_to=1000"):
        run(tmp_path / "other", rewind_to=1000)


def test_other_methods_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="rigl has no lottery levels"):
        run(tmp_path, method=methods.rigl(0.1))


# --- what is rewound ------------------------------------------------------------------------------------------------


class Record(Power):
    """Where every level starts from, and the learning rate of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.start: dict[int, dict[str, torch.Tensor]] = {}
        self.momentum: dict[int, list[torch.Tensor]] = {}
        self.rates: dict[int, list[float]] = {}
        self.batches: dict[int, list[float]] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        super().on_train_start(trainer, module)
        self.start[self.level] = {k: v.clone() for k, v in _model_state(module).items()}
        states = trainer.optimizers[0].state
        self.momentum[self.level] = [
            states[p]["momentum_buffer"].clone() for p in module.parameters() if "momentum_buffer" in states[p]
        ]

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.batches.setdefault(self.level, []).append(float(batch[0].sum()))

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.rates.setdefault(self.level, []).append(optimizer.param_groups[0]["lr"])


def momentum_in(path: Path) -> list[torch.Tensor]:
    (optimizer,) = torch.load(path, weights_only=True)["optimizer_states"]
    return [entry["momentum_buffer"] for entry in optimizer["state"].values()]


def exponential(optimizer: Any, steps: int) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


@pytest.mark.parametrize(
    ("rewind", "schedule", "rewind_to"),
    rotated(["weights", "learning_rate", "none"], [cosine, exponential], [0, 7], each=2),
)
def test_what_goes_back_and_what_stays(tmp_path, monkeypatch, rewind, rewind_to, schedule):
    """Renda et al. 2020, section 2: weights and rates, rates alone, or nothing but the pruned weights to zero."""
    monkeypatch.setitem(globals(), "cosine", schedule)
    record = Record()
    method = methods.lottery_ticket_rewind(0.7, rewind=rewind, rewind_to=rewind_to)
    _, result, _ = run(tmp_path, record, method=method)
    assert record.started == [(0, 0), (1, rewind_to), (2, rewind_to)]
    steps = EPOCHS * STEPS_PER_EPOCH
    assert [r.steps for r in result.levels] == [steps, *[steps - rewind_to] * 2]
    dense = record.rates[0]
    assert len(set(dense)) == steps
    for level in (1, 2):
        place, before = tmp_path / f"level_{level:02d}", tmp_path / f"level_{level - 1:02d}" / "final.ckpt"
        source = tmp_path / "snapshot.ckpt" if rewind == "weights" else before
        masks = load_masks(place / "masks.pt")
        for name, value in record.start[level].items():
            assert torch.equal(value, weights_in(source)[name] * masks.get(name, 1)), (level, name)
        old = momentum_in(source)
        assert len(old) == len(record.momentum[level]) == (0 if rewind == "weights" and rewind_to == 0 else 6)
        for here, there in zip(record.momentum[level], old, strict=True):
            mask = next((m for m in masks.values() if m.shape == here.shape), torch.ones_like(here))
            assert torch.equal(here, there * mask)
        expected = [dense[-1]] * (steps - rewind_to) if rewind == "none" else dense[rewind_to:]
        assert record.rates[level] == expected
        assert record.batches[level] == record.batches[0][rewind_to:]


def test_one_shot_prunes_once(tmp_path):
    _, result, power = run(tmp_path, prune_fraction=None, rewind="learning_rate", rewind_to=5)
    assert [r.density for r in result.levels] == [1.0, 0.6]
    assert power.started == [(0, 0), (1, 5)]
    # Six tenths of 888 weights are 532.8.
    assert sum(line["nonzero"] for line in result.levels[-1].layers) == 533


def test_rates_are_those_of_the_snapshot_and_state_that_of_the_end():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], 0.5, momentum=0.9)
    snapshot = optimizer.state_dict()
    weight.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.load_state_dict(rewind_rates(optimizer.state_dict(), snapshot))
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], torch.ones(3))


def test_fine_tuning_needs_the_dense_levels_last_rate(tmp_path):
    run(tmp_path, rewind="none", rewind_to=7)
    final = tmp_path / "level_00" / "final.ckpt"
    checkpoint = torch.load(final, weights_only=True)
    torch.save({k: v for k, v in checkpoint.items() if k != "dst_rates"}, final)
    for record in tmp_path.glob("level_0[123]/level.json"):
        record.unlink()
    with pytest.raises(StateError, match=r"level_00.*last learning rates.*train level 0 again"):
        run(tmp_path, rewind="none", rewind_to=7)


def test_the_last_rate_is_known_where_the_dense_level_was_interrupted_as_it_ended(tmp_path):
    whole, halted = Record(), Record()
    run(tmp_path / "whole", whole, rewind="none", rewind_to=7)
    power = Power()
    power.cut_at = (0, "fit end")
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "halted", power, rewind="none", rewind_to=7)
    run(tmp_path / "halted", halted, rewind="none", rewind_to=7)
    assert halted.rates == {level: whole.rates[level] for level in (1, 2, 3)}
