"""The engine: invariants of every step of every method under every optimizer; states; errors."""

from __future__ import annotations

import copy
import io
import logging
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import dst
from dst import ConfigurationError, Sparsifier, StateError, methods
from dst.allocation import ER, ERK, Global, PerLayer, Uniform
from dst.init import FromFile, Magnitude, Snip
from dst.schedules import Constant
from dst.scores import Momentum
from dst.scores import Random as RandomScore
from dst.topology.optimizer_state import per_weight_state
from dst.types import waits_for_batch
from tests.checks import active_counts, check_budget, check_inactive_are_zero, equal, settles_at
from tests.methods_list import DENSITY, DYNAMIC, LATENT, METHODS, TOTAL_STEPS
from tests.sampling import rotated
from tests.small import (
    OPTIMIZERS,
    Odd,
    Small,
    backward,
    batch,
    random_gradients,
    sparsified,
    state_dicts,
    train,
    values,
)


def states(optimizer, parameter):
    return {k: v.clone() for k, v in optimizer.state[parameter].items() if torch.is_tensor(v)}


def counts(sparsifier):
    """Active weights of each layer, in their order."""
    return list(active_counts(sparsifier).values())


def reported(sparsifier):
    return [line["nonzero"] for line in sparsifier.layer_table()]


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# --- every step of every method -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method_name", "optimizer_name"), rotated([name for name in METHODS if name not in LATENT], OPTIMIZERS)
)
def test_what_holds_at_every_step(method_name, optimizer_name):
    method = METHODS[method_name]()
    model, optimizer, sparsifier = sparsified(method, optimizer_name)
    parameters = {name: model.get_parameter(name) for name in sparsifier.masks}
    budget = None
    fired = 0
    churn = 0.0
    for step in range(TOTAL_STEPS):
        assert sparsifier.step == step
        was_sparse, masks, before = sparsifier.is_sparse, sparsifier.masks, values(model)
        handed_out = {name: mask.clone() for name, mask in masks.items()}
        backward(model, optimizer, step, sparsifier)
        sparsifier.before_step()
        due = was_sparse and (method.clock.fires(step, TOTAL_STEPS) or step == settles_at(method))
        fired += due
        assert sparsifier.updates == fired
        after = sparsifier.masks
        assert equal(handed_out, masks)  # masks that were handed out are not changed afterwards
        if was_sparse:
            assert equal(masks, after) or due
        prepared = values(model)
        replaced = due and method.replace_step
        for name, parameter in parameters.items():
            mask, old = after[name], masks[name]
            grown, dropped, kept = mask & ~old, old & ~mask, mask & old
            if parameter.grad is not None:
                assert not parameter.grad[~mask].any()
            # The decision itself moves no weight but those dropped, to zero. Grown ones start at zero; what was dropped and
            # grown again at once is among the kept, and keeps its value.
            assert torch.equal(prepared[name][kept], before[name][kept])
            assert not prepared[name][~mask].any()
            assert not prepared[name][grown].any()
            for _, value in per_weight_state(optimizer, parameter):
                if not equal(old, mask):
                    assert not value[grown | dropped].any()
                if optimizer_name in ("sgd", "adamw", "nadam"):
                    assert not value[~mask].any()
        churn = max(churn, sparsifier.churn)
        optimizer.step()
        stepped = values(model)
        if replaced:
            assert equal(stepped, prepared)
            assert all(p.grad is None for p in model.parameters())
        else:
            assert not equal(stepped, prepared) or (waits_for_batch(method.init) and not was_sparse)
        check_inactive_are_zero(model, sparsifier.masks)
        if sparsifier.is_sparse:
            assert counts(sparsifier) == reported(sparsifier)
            moved = due and (method.schedule is not None or method.surplus is not None)
            budget = counts(sparsifier) if moved or budget is None else budget
            ablates = (
                getattr(method.pattern, "ablate", 0) > 0
            )  # then a layer's outputs share what they can of the budget
            if method.redistribute is None and not ablates:
                assert counts(sparsifier) == budget
            assert sparsifier.active == sum(counts(sparsifier))
            assert ablates or sparsifier.active == sum(budget)
            assert min(counts(sparsifier)) >= 1
            if due and method.surplus is None and not method.pattern.for_density(method.density).is_grouped:
                wanted = method.density_at(step, TOTAL_STEPS) * sum(layer.weights for layer in sparsifier.layers)
                assert abs(sparsifier.active - wanted) <= len(sparsifier.layers)
    assert sparsifier.step == sum(sparsifier.step_counts.values()) == TOTAL_STEPS
    assert sparsifier.is_sparse
    assert (fired > 0) == method.is_dynamic
    check_budget(sparsifier, method)
    assert sparsifier.density == sparsifier.active / sum(layer.weights for layer in sparsifier.layers)
    if method.is_dynamic:
        partly = [row for row in sparsifier.layer_table() if row["density"] < 1]  # dense ones have nothing to explore
        assert sparsifier.exploration_rate > sum(r["nonzero"] for r in partly) / sum(r["weights"] for r in partly)
        assert (churn > 0) == (method.grow is not None)


def test_the_network_of_these_tests_has_a_layer_of_every_kind():
    _, _, sparsifier = sparsified(methods.rigl(DENSITY))
    assert [layer.label for layer in sparsifier.layers] == [
        "conv.weight",
        *(f"attention.in_proj_weight[{part}]" for part in "qkv"),
        "attention.out_proj.weight",
        "hidden.weight",
        "head.weight",
    ]
    assert set(METHODS) - set(DYNAMIC) - set(LATENT) == {
        "dense",
        "small_dense",
        "static",
        "static_at_step",
        "static_from_start",
        "static_snip",
        "static_global_blocks",
        "snip",
        "grasp",
        "synflow",
        "sparse_from_scratch",
    }


@pytest.mark.parametrize("regrow", [True, False])
def test_rigl_agrees_with_a_plain_implementation(regrow):
    """Sort, layer by layer: drop the smallest magnitudes, grow the largest gradients."""
    method = methods.rigl(DENSITY, update_every=3, regrow_dropped=regrow, fraction=Constant(0.4))
    model, optimizer, sparsifier = sparsified(method)
    seen = regrown = 0
    for step in range(13):
        before, masks = values(model), sparsifier.masks
        random_gradients(model, step)
        gradients = {name: model.get_parameter(name).grad.clone() for name in masks}
        sparsifier.before_step()
        if step % 3 == 0:
            for layer in sparsifier.layers:
                old, weight, gradient, new = (
                    layer.part(x[layer.parameter]).flatten().tolist()
                    for x in (masks, before, gradients, sparsifier.masks)
                )
                active = [i for i, on in enumerate(old) if on]
                count = 2 * len(active) // 5
                dropped = sorted(active, key=lambda i, w=weight: abs(w[i]))[:count]
                kept = set(active) - set(dropped)
                excluded = kept if regrow else set(active)
                candidates = [i for i in range(len(old)) if i not in excluded]
                count = min(count, len(candidates))
                if not regrow:
                    kept = set(active) - set(dropped[:count])
                grown = sorted(candidates, key=lambda i, g=gradient: -abs(g[i]))[:count]
                assert {i for i, on in enumerate(new) if on} == kept | set(grown)
                seen += count
                regrown += len(set(grown) & set(dropped))
        optimizer.step()
    assert seen > 100
    assert (regrown > 0) == regrow


def test_momentum_grows_by_the_mean_of_all_dense_gradients():
    method = methods.rigl(
        0.3,
        allocation=Uniform(),
        update_every=5,
        start=5,
        grow=Momentum(0.5),
        fraction=Constant(0.2),
        regrow_dropped=False,
    )
    model, optimizer, sparsifier = sparsified(method, model=nn.Linear(8, 6))
    mean = torch.zeros(6, 8)
    for step in range(6):
        inputs = torch.randn(4, 8)
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        mean = 0.5 * mean + 0.5 * model.weight.grad
        old = sparsifier.masks["weight"]
        sparsifier.before_step()
        optimizer.step()
        assert sparsifier.step_counts["dense_gradient"] == step + 1
    grown = sparsifier.masks["weight"] & ~old
    # 15 of 48 weights are active, and 3 of them are replaced.
    expected = mean.abs().masked_fill(old, -1).flatten().topk(3).indices.sort().values
    assert grown.flatten().nonzero().squeeze(1).tolist() == expected.tolist()


@dataclass(frozen=True)
class Favourite(RandomScore):
    """Scores active weights highest, so that a dropped weight regrows at once."""

    def __call__(self, view):
        return view.mask.float()


def test_a_connection_that_regrows_at_once_keeps_value_and_momentum():
    method = methods.set_(0.5, update_every=1, fraction=Constant(0.5), grow=Favourite(), replace_step=True)
    model, optimizer, sparsifier = sparsified(method, "adamw")
    backward(model, optimizer, 0)
    sparsifier.before_step()
    optimizer.step()
    before, masks = values(model), sparsifier.masks
    for _ in range(3):
        backward(model, optimizer, 1)
        sparsifier.before_step()
        optimizer.step()
    assert sparsifier.updates == 4
    assert sparsifier.churn == 0
    assert equal(values(model), before)
    assert equal(sparsifier.masks, masks)


def test_state_that_is_not_per_weight_is_left_alone():
    model, optimizer, sparsifier = sparsified(methods.rigl(DENSITY, update_every=2, fraction=Constant(0.5)), "odd")
    train(model, optimizer, sparsifier, 4)
    backward(model, optimizer, 4)
    parameter = model.hidden.weight
    before = states(optimizer, parameter)
    old = sparsifier.masks["hidden.weight"]
    sparsifier.before_step()
    after = states(optimizer, parameter)
    changed = old ^ sparsifier.masks["hidden.weight"]
    assert changed.any()
    for key in ("scalar", "rows", "flat"):
        assert torch.equal(before[key], after[key])
    for key in ("trace", "seen", "touched"):
        assert not after[key][changed].any()
        assert torch.equal(before[key][~changed], after[key][~changed])


# --- the clock, the fractions and the numbers shown -----------------------------------------------------------------


def test_updates_happen_at_the_clocks_steps_with_the_schedules_fractions():
    method = methods.rigl(DENSITY, update_every=4, start=2, stop=0.5)
    model, optimizer, sparsifier = sparsified(method)
    history = []
    for _ in range(TOTAL_STEPS):
        updates = sparsifier.updates
        train(model, optimizer, sparsifier, 1)
        if sparsifier.updates > updates:
            last = sparsifier.last_update
            history.append(last.step)
            assert last.fraction == sparsifier.drop_fraction == method.fraction(last.step, 12)
    assert history == [2, 6, 10]
    assert sparsifier.step_counts == {"dense": 0, "sparse": TOTAL_STEPS - 3, "dense_gradient": 3}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (methods.dense(), {"dense": 24, "sparse": 0, "dense_gradient": 0}),
        (
            methods.static(DENSITY),
            {"dense": 7, "sparse": 17, "dense_gradient": 0},
        ),  # the mask is made after a backward pass
        (methods.static(DENSITY, init=Snip()), {"dense": 1, "sparse": 23, "dense_gradient": 0}),
        (methods.sparse_from_scratch(DENSITY), {"dense": 0, "sparse": 24, "dense_gradient": 0}),
        (methods.set_(DENSITY, update_every=5), {"dense": 0, "sparse": 24, "dense_gradient": 0}),
        (methods.rigl(DENSITY, update_every=5), {"dense": 0, "sparse": 20, "dense_gradient": 4}),
        (methods.rigl(DENSITY, grow=Momentum(), stop=10), {"dense": 0, "sparse": 14, "dense_gradient": 10}),
    ],
    ids=["dense", "static", "snip", "scratch", "set", "rigl", "momentum"],
)
def test_steps_are_counted_by_their_cost(method, expected):
    model, optimizer, sparsifier = sparsified(method)
    train(model, optimizer, sparsifier, TOTAL_STEPS)
    assert sparsifier.step_counts == expected


def test_churn_is_the_share_of_connections_that_are_new():
    method = methods.set_(
        0.5, update_every=2, start=1, fraction=Constant(0.4), regrow_dropped=False, allocation=Uniform()
    )
    model, optimizer, sparsifier = sparsified(method)
    assert sparsifier.churn == sparsifier.drop_fraction == 0
    train(model, optimizer, sparsifier, 1)
    before = sparsifier.masks
    train(model, optimizer, sparsifier, 1)
    new = sum(int((mask & ~before[name]).sum()) for name, mask in sparsifier.masks.items())
    assert sparsifier.churn == new / sparsifier.active
    assert new == sum(2 * c // 5 for c in counts(sparsifier))
    assert sparsifier.drop_fraction == 0.4


@pytest.mark.parametrize("allocation", [Uniform(), ER(), ERK(), Global()])
@pytest.mark.parametrize("density", [0.05, 0.5, 0.9])
def test_first_masks_have_the_allocations_counts(allocation, density):
    model = Small()
    weights = values(model)
    _, _, sparsifier = sparsified(
        methods.static(density, sparsify_at=0, init=Magnitude(), allocation=allocation), model=model
    )
    labels = [layer.label for layer in sparsifier.layers]
    shapes = [layer.shape for layer in sparsifier.layers]
    scores = [layer.part(weights[layer.parameter]).abs() for layer in sparsifier.layers]
    assert counts(sparsifier) == allocation.counts(labels, shapes, density, scores)
    for layer, score in zip(sparsifier.layers, scores, strict=True):
        mask = layer.part(sparsifier.masks[layer.parameter])
        if not mask.all():
            assert score[mask].min() >= score[~mask].max()
    for name, mask in sparsifier.masks.items():
        assert torch.equal(model.get_parameter(name).detach(), weights[name] * mask)


def test_the_table_of_layers():
    _, _, sparsifier = sparsified(methods.rigl(0.5, allocation=Uniform()))
    assert sparsifier.layer_table()[-1] == {
        "name": "head.weight",
        "shape": [3, 20],
        "weights": 60,
        "nonzero": 30,
        "density": 0.5,
    }
    assert "rigl" in repr(sparsifier)


# --- first masks ----------------------------------------------------------------------------------------------------


def test_static_trains_dense_until_its_mask_is_made_of_the_trained_weights():
    model, optimizer, sparsifier = sparsified(methods.static(DENSITY, sparsify_at=0.25))
    reference = Small()
    reference.load_state_dict(model.state_dict())
    plain = OPTIMIZERS["sgd"](reference.parameters())
    for step in range(6):
        train(model, optimizer, sparsifier, 1)
        backward(reference, plain, step)
        plain.step()
        assert not sparsifier.is_sparse
        assert sparsifier.density == sparsifier.exploration_rate == 1
    assert equal(values(model), values(reference))
    scores = [layer.part(reference.get_parameter(layer.parameter).detach().abs()) for layer in sparsifier.layers]
    train(model, optimizer, sparsifier, 1)
    assert sparsifier.is_sparse
    assert counts(sparsifier) == Global().counts("", [x.shape for x in sparsifier.layers], DENSITY, scores)
    for layer, score in zip(sparsifier.layers, scores, strict=True):
        mask = layer.part(sparsifier.masks[layer.parameter])
        assert score[mask].min() >= score[~mask].max()
    fixed = sparsifier.masks
    for name in fixed:
        for _, value in per_weight_state(optimizer, model.get_parameter(name)):
            assert not value[~fixed[name]].any()
    train(model, optimizer, sparsifier, 10)
    assert equal(sparsifier.masks, fixed)


def test_the_first_step_of_snip_makes_the_mask_and_nothing_else():
    model, optimizer, sparsifier = sparsified(methods.static(DENSITY, init=Snip()), "adamw")
    before = values(model)
    assert not sparsifier.is_sparse
    backward(model, optimizer, 0)
    scores = {n: (model.get_parameter(n).grad * before[n]).abs() for n in sparsifier.masks}
    sparsifier.before_step()
    optimizer.step()
    assert sparsifier.active == 186  # three tenths of 620
    for layer in sparsifier.layers:
        mask, score = (layer.part(x[layer.parameter]) for x in (sparsifier.masks, scores))
        assert score[mask].min() >= score[~mask].max()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] * sparsifier.masks.get(name, 1))
    assert sparsifier.step == 1


def test_snip_waits_for_finite_gradients():
    model, optimizer, sparsifier = sparsified(methods.static(DENSITY, init=Snip()))
    backward(model, optimizer, 0)
    saved = model.hidden.weight.grad[0, 0].clone()
    model.hidden.weight.grad[0, 0] = torch.inf
    sparsifier.before_step()
    assert not sparsifier.is_sparse
    model.hidden.weight.grad[0, 0] = saved
    sparsifier.before_step()
    optimizer.step()
    assert sparsifier.is_sparse


def test_snip_names_a_layer_without_gradient():
    model, _, sparsifier = sparsified(methods.static(DENSITY, init=Snip()))
    model.conv(torch.randn(2, 2, 6, 6)).sum().backward()
    with pytest.raises(ConfigurationError, match=r"attention\.in_proj_weight has no gradient, and Snip needs one"):
        sparsifier.before_step()


def test_masks_from_a_file(tmp_path):
    source, optimizer, made = sparsified(methods.rigl(DENSITY), seed=7)
    train(source, optimizer, made, 5)
    path = tmp_path / "masks.pt"
    dst.save_masks(made.masks, path)
    density = made.density
    model = Small()
    weights = values(model)
    _, optimizer, sparsifier = sparsified(methods.static(density, init=FromFile(str(path))), model=model)
    assert equal(sparsifier.masks, made.masks)
    assert all(torch.equal(model.get_parameter(n).detach(), weights[n] * m) for n, m in made.masks.items())
    train(model, optimizer, sparsifier, 3)
    assert equal(sparsifier.masks, made.masks)
    with pytest.raises(
        ConfigurationError, match=rf"masks\.pt have density {density:.6g}, the method 0\.5; pass density="
    ):
        sparsified(methods.static(0.5, init=FromFile(str(path))))
    with pytest.raises(StateError, match=r"does not fit the model: has unknown \['head.weight'\]"):
        sparsified(methods.static(density, init=FromFile(str(path))), exclude=["head"])
    masks = {**made.masks, "head.weight": torch.ones(2, 2, dtype=torch.bool)}
    dst.save_masks(masks, path)
    with pytest.raises(StateError, match=r"head\.weight as \(2, 2\) torch.bool, the model as \(3, 20\)"):
        sparsified(methods.static(density, init=FromFile(str(path))))


@pytest.mark.parametrize(
    ("module", "inputs", "channels"),
    [
        (nn.Linear(600, 200, bias=False), (400, 600), 1),
        (nn.Conv2d(40, 80, 3, bias=False), (20, 40, 10, 10), 1),
        (nn.ConvTranspose2d(80, 160, 3, bias=False), (20, 80, 10, 10), 1),
    ],
    ids=["linear", "conv", "transposed"],
)
def test_rescaled_weights_keep_the_variance_of_every_output(module, inputs, channels):
    nn.init.normal_(module.weight, std=0.05)
    data = torch.randn(inputs)
    dims = [d for d in range(data.ndim) if d != channels]

    def variances():
        out = module(data).detach()
        return out[..., 2:-2, 2:-2].var(dim=dims) if out.ndim == 4 else out.var(dim=dims)

    dense = variances()
    method = methods.sparse_from_scratch(0.1, allocation=Uniform())
    original = module.weight.detach().clone()
    model, _, sparsifier = sparsified(method, model=module)
    ratio = variances() / dense
    assert ratio.mean() == pytest.approx(1, abs=0.05)
    dimension = 1 if isinstance(module, nn.ConvTranspose2d) else 0
    mask = sparsifier.masks["weight"]
    others = [d for d in range(mask.ndim) if d != dimension]
    fan_in = module.weight.numel() / module.weight.shape[dimension]
    scale = (fan_in / mask.sum(others, keepdim=True)).sqrt()
    torch.testing.assert_close(model.weight.detach(), original * mask * scale)


def test_an_output_without_connections_is_left_at_zero_and_not_at_nan():
    model = nn.Linear(4, 50)
    sparsified(methods.sparse_from_scratch(0.01, allocation=Uniform()), model=model)
    assert model.weight.isfinite().all()


def test_initial_weights_are_not_rescaled_unless_asked():
    for rescale in (False, True):
        model = Small()
        weights = values(model)
        _, _, sparsifier = sparsified(methods.rigl(DENSITY, rescale_init=rescale), model=model)
        same = all(torch.equal(model.get_parameter(n).detach(), weights[n] * m) for n, m in sparsifier.masks.items())
        assert same is not rescale


# --- gradients that are missing or not finite -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["hidden.weight", "attention.in_proj_weight"])
@pytest.mark.parametrize("make", [methods.rigl, methods.set_])
def test_a_gradient_that_is_not_finite_skips_the_update_and_counts_it(make, name, value, caplog):
    model, optimizer, sparsifier = sparsified(make(DENSITY, update_every=2), "sgd")
    train(model, optimizer, sparsifier, 2)
    masks, updates = sparsifier.masks, sparsifier.updates
    backward(model, optimizer, 2)
    active = sparsifier.masks[name].nonzero()[0]
    model.get_parameter(name).grad[tuple(active)] = value
    with caplog.at_level(logging.WARNING):
        sparsifier.before_step()
    assert equal(sparsifier.masks, masks)
    assert (sparsifier.updates, sparsifier.skipped) == (updates, 1)
    assert "not finite" in caplog.text
    optimizer.zero_grad()
    sparsifier.before_step()  # what a gradient scaler does: no step was taken, the next batch is the same step
    backward(model, optimizer, 2)
    assert sparsifier.step == 2


def test_large_gradients_whose_sum_overflows_are_finite():
    model, optimizer, sparsifier = sparsified(methods.rigl(DENSITY, update_every=2))
    backward(model, optimizer, 0)
    model.hidden.weight.grad.fill_(3e38)
    sparsifier.before_step()
    assert (sparsifier.updates, sparsifier.skipped) == (1, 0)


def test_a_dense_parameters_gradient_that_is_not_finite_skips_the_update_too():
    """A gradient scaler then skips the step: the update would happen now and again at the retry."""
    model, optimizer, sparsifier = sparsified(methods.rigl(DENSITY, update_every=2))
    backward(model, optimizer, 0)
    model.head.bias.grad[0] = torch.inf
    sparsifier.before_step()
    assert (sparsifier.updates, sparsifier.skipped) == (0, 1)


def test_a_step_that_was_not_taken_does_not_advance_the_clock():
    model, optimizer, sparsifier = sparsified(methods.rigl(DENSITY, update_every=2, start=1))
    for _ in range(3):
        backward(model, optimizer, 0)
        sparsifier.before_step()
    assert (sparsifier.step, sparsifier.updates) == (0, 0)
    train(model, optimizer, sparsifier, 1)
    assert sum(sparsifier.step_counts.values()) == sparsifier.step == 1


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_gradient_of_an_inactive_weight_that_is_not_finite_does_not_reach_it(value):
    model, optimizer, sparsifier = sparsified(methods.rigl(DENSITY, start=5))
    backward(model, optimizer, 0)
    inactive = tuple((~sparsifier.masks["hidden.weight"]).nonzero()[0])
    model.hidden.weight.grad[inactive] = value
    sparsifier.before_step()
    optimizer.step()
    check_inactive_are_zero(model, sparsifier.masks)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("grow", [None, Momentum()])
def test_a_layer_without_gradient_keeps_its_connections(grow, caplog):
    model, optimizer, sparsifier = sparsified(methods.rigl(DENSITY, update_every=1, grow=grow, fraction=Constant(0.5)))
    before = sparsifier.masks
    model.hidden.weight.requires_grad_(False)  # takes no part any more
    with caplog.at_level(logging.WARNING):
        train(model, optimizer, sparsifier, 3)
    assert torch.equal(sparsifier.masks["hidden.weight"], before["hidden.weight"])
    assert not torch.equal(sparsifier.masks["conv.weight"], before["conv.weight"])
    assert caplog.text.count("hidden.weight had no gradient") == 1
    assert sparsifier.updates == 3


def test_scores_that_need_no_gradient_rewire_layers_without_one():
    _, optimizer, sparsifier = sparsified(methods.set_(DENSITY, update_every=1, fraction=Constant(0.5)))
    before = sparsifier.masks
    sparsifier.before_step()
    optimizer.step()
    assert not any(torch.equal(before[name], mask) for name, mask in sparsifier.masks.items())


def test_a_sparse_gradient_is_refused():
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = Sparsifier(model, optimizer, methods.rigl(0.5), total_steps=5, include=["weight"])
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ConfigurationError, match=r"weight has a sparse gradient.*sparse=False"):
        sparsifier.before_step()


# --- optimizers -----------------------------------------------------------------------------------------------------


def test_several_optimizers_move_their_own_layers_at_their_own_steps():
    model = Small()
    own = {"hidden.weight", "head.weight"}
    first = OPTIMIZERS["sgd"]([p for n, p in model.named_parameters() if n not in own])
    second = OPTIMIZERS["adamw"]([model.hidden.weight, model.head.weight])
    method = methods.rigl(DENSITY, update_every=2, start=1, fraction=Constant(0.5))
    sparsifier = Sparsifier(model, [first, second], method, total_steps=20)
    budget = counts(sparsifier)
    changed = []
    for step, optimizer in enumerate([first, first, second, first, second, first, second, second]):
        before = sparsifier.masks
        model.zero_grad()
        backward(model, first, step)
        sparsifier.before_step(optimizer)
        optimizer.step()
        changed.append({n for n, m in sparsifier.masks.items() if not torch.equal(before[n], m)})
        assert counts(sparsifier) == budget
        check_inactive_are_zero(model, sparsifier.masks)
    others = set(sparsifier.masks) - own
    nothing: set[str] = set()
    assert changed == [nothing, others, nothing, nothing, own, others, nothing, own]
    assert sparsifier.step == 4
    assert sparsifier.state_dict()["steps"] == [4, 4]


def test_one_call_prepares_all_optimizers():
    model = Small()
    pairs = [OPTIMIZERS["sgd"]([p]) for p in model.parameters()]
    sparsifier = Sparsifier(model, pairs, methods.set_(DENSITY, update_every=2), total_steps=20)
    backward(model, pairs[0], 0)
    sparsifier.before_step()
    for optimizer in pairs:
        optimizer.step()
    check_inactive_are_zero(model, sparsifier.masks)


def test_snip_refuses_several_optimizers():
    model = Small()
    optimizers = [OPTIMIZERS["sgd"]([p]) for p in model.parameters()]
    with pytest.raises(ConfigurationError, match="Snip needs every layer's gradient at one step"):
        Sparsifier(model, optimizers, methods.static(DENSITY, init=Snip()), total_steps=5)


def test_a_step_without_before_step_is_an_error():
    model, optimizer, sparsifier = sparsified(methods.rigl(DENSITY))
    train(model, optimizer, sparsifier, 1)
    backward(model, optimizer, 1)
    with pytest.raises(StateError, match=r"without sparsifier\.before_step\(\)"):
        optimizer.step()
    assert sparsifier.step == 1
    check_inactive_are_zero(model, sparsifier.masks)


def test_a_sparse_parameter_that_no_optimizer_holds_is_named():
    model = Small()
    optimizer = OPTIMIZERS["sgd"]([p for n, p in model.named_parameters() if not n.startswith("head")])
    with pytest.raises(ConfigurationError, match=r"^head\.weight are in no optimizer.*exclude="):
        sparsified(methods.rigl(DENSITY), optimizer, model=model)
    sparsified(methods.rigl(DENSITY), optimizer, model=model, exclude=["head"])


def test_lbfgs_is_refused():
    model = Small()
    with pytest.raises(ConfigurationError, match="LBFGS evaluates the loss several times"):
        sparsified(methods.rigl(DENSITY), torch.optim.LBFGS(model.parameters()), model=model)


def test_a_closure_may_prepare_the_step():
    model, optimizer, sparsifier = sparsified(methods.rigl(DENSITY, update_every=2, replace_step=False))

    def closure():
        images, labels = batch(0)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        sparsifier.before_step()
        return loss

    for _ in range(4):
        optimizer.step(closure)
        check_inactive_are_zero(model, sparsifier.masks)
    assert (sparsifier.step, sparsifier.updates) == (4, 2)


def test_clipping_sees_masked_gradients():
    model, optimizer, sparsifier = sparsified(methods.rigl(DENSITY, start=5))
    backward(model, optimizer, 0)
    expected = sum(
        (p.grad * sparsifier.masks.get(n, 1)).square().sum() for n, p in model.named_parameters() if p.grad is not None
    ).sqrt()
    sparsifier.before_step()
    assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) == pytest.approx(float(expected), rel=1e-6)


def test_finalize_removes_the_hooks_and_leaves_zeros():
    model, optimizer, sparsifier = sparsified(methods.rigl(DENSITY, update_every=2), "odd")
    train(model, optimizer, sparsifier, 3)
    masks = sparsifier.masks
    with torch.no_grad():
        model.hidden.weight.add_(1)
    sparsifier.finalize()
    check_inactive_are_zero(model, sparsifier.masks)
    assert equal(sparsifier.masks, masks)
    backward(model, optimizer, 3)
    optimizer.step()  # an ordinary step again
    assert model.hidden.weight[~masks["hidden.weight"]].any()
    assert sparsifier.step == 3
    sparsifier.finalize()


def test_a_finalized_sparsifier_makes_room_for_the_next():
    model, optimizer, sparsifier = sparsified(methods.rigl(DENSITY))
    sparsifier.finalize()
    _, _, following = sparsified(methods.set_(DENSITY), optimizer, model=model)
    train(model, optimizer, following, 2)
    assert (sparsifier.step, following.step) == (0, 2)


# --- models ---------------------------------------------------------------------------------------------------------


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = Small()
    with pytest.raises(ConfigurationError, match=r"conv\.weight is on the meta device"):
        sparsified(methods.rigl(DENSITY), model=model)


def test_complex_weights_are_refused():
    model = nn.Linear(4, 4, dtype=torch.complex64)
    with pytest.raises(ConfigurationError, match=r"weight has dtype torch\.complex64"):
        sparsified(methods.rigl(DENSITY), model=model)


@pytest.mark.parametrize("total_steps", [0, -1, 1.5, None, True])
def test_total_steps_must_be_a_positive_number(total_steps):
    with pytest.raises(ConfigurationError, match="total_steps="):
        sparsified(methods.rigl(DENSITY), total_steps=total_steps)


def test_a_method_of_several_fits_is_refused():
    with pytest.raises(ConfigurationError, match="run_lottery"):
        sparsified(methods.lottery_ticket_rewind(DENSITY))


def test_a_mask_that_would_never_be_made_is_refused():
    with pytest.raises(ConfigurationError, match="sparsify_at"):
        sparsified(methods.static(DENSITY, sparsify_at=TOTAL_STEPS))


class TiedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_tied_modules_share_one_mask():
    model, optimizer, sparsifier = sparsified(
        methods.rigl(0.2, update_every=2, allocation=Uniform()), model=TiedModel()
    )
    assert list(sparsifier.masks) == ["first.weight"]
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 10)).square().sum().backward()
        sparsifier.before_step()
        optimizer.step()
        assert model.second.weight is model.first.weight
        assert int(model.second.weight.count_nonzero()) <= 20 == sparsifier.active
        check_inactive_are_zero(model, sparsifier.masks)


def channels_last():
    return Small().to(memory_format=torch.channels_last)


def transposed():
    model = Small()
    model.hidden.weight = nn.Parameter(model.hidden.weight.detach().t().contiguous().t())
    packed = model.attention.in_proj_weight.detach()
    model.attention.in_proj_weight = nn.Parameter(packed.t().contiguous().t())
    return model


def gapped():
    model = Small()
    model.hidden.weight = nn.Parameter(torch.randn(20, 16)[:, ::2])
    return model


@pytest.mark.parametrize(
    ("method_name", "make"),
    rotated(
        ["rigl", "set", "momentum_growth", "static", "rigl_global_start"], [channels_last, transposed, gapped], each=2
    ),
)
def test_strides_make_no_difference(make, method_name):
    strided = make()
    plain = Small()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(strided.get_parameter(name))
    assert any(not p.is_contiguous() for p in strided.parameters())
    results = []
    for model in (plain, strided):
        model, optimizer, sparsifier = sparsified(METHODS[method_name](), model=model)
        for step in range(10):
            random_gradients(model, step)
            sparsifier.before_step()
            optimizer.step()
            check_inactive_are_zero(model, sparsifier.masks)
        assert counts(sparsifier) == reported(sparsifier)
        results.append((sparsifier.masks, values(model), sparsifier.state_dict()))
    assert not all(mask.all() for mask in results[0][0].values())
    assert equal(results[0], results[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method_name", ["rigl", "set", "momentum_growth", "static", "snip", "sparse_from_scratch"])
def test_other_dtypes(dtype, method_name):
    model, optimizer, sparsifier = sparsified(METHODS[method_name](), model=Small().to(dtype))
    budget = None
    for _ in range(10):
        train(model, optimizer, sparsifier, 1)
        check_inactive_are_zero(model, sparsifier.masks)
        if sparsifier.is_sparse:
            budget = budget or counts(sparsifier)
            assert counts(sparsifier) == reported(sparsifier) == budget
    assert {p.dtype for p in model.parameters()} == {dtype}
    if METHODS[method_name]().is_dynamic:
        assert sparsifier.updates == 3


def test_a_model_may_change_its_dtype_on_the_way():
    model, optimizer, sparsifier = sparsified(methods.rigl(DENSITY, update_every=2))
    train(model, optimizer, sparsifier, 1)
    model.double()
    optimizer.state.clear()
    train(model, optimizer, sparsifier, 4)
    check_inactive_are_zero(model, sparsifier.masks)
    assert counts(sparsifier) == reported(sparsifier)


def test_dense_layers_are_left_unchanged():
    table = {"conv.weight": 1.0, "*": 0.25}
    total = sum(layer.weights for layer in sparsified(methods.dense())[2].layers)
    method = methods.rigl((144 + 0.25 * (total - 144)) / total, update_every=2, allocation=PerLayer(table))
    model, optimizer, sparsifier = sparsified(method)
    train(model, optimizer, sparsifier, 6)
    assert sparsifier.masks["conv.weight"].all()
    assert model.conv.weight.count_nonzero() == 144


def test_dense_trains_as_if_nothing_were_there():
    model, optimizer, sparsifier = sparsified(methods.dense(), "adamw")
    reference = Small()
    reference.load_state_dict(model.state_dict())
    plain = OPTIMIZERS["adamw"](reference.parameters())
    train(model, optimizer, sparsifier, 6)
    for step in range(6):
        backward(reference, plain, step)
        plain.step()
    assert equal(values(model), values(reference))
    assert all(mask.all() for mask in sparsifier.masks.values())
    assert sparsifier.density == sparsifier.exploration_rate == 1


# --- seeds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_name", ["set", "rigl", "sparse_from_scratch"])
def test_a_seed_reproduces_and_another_differs(method_name):
    def run(seed, disturbed=False):
        torch.manual_seed(3)
        model, optimizer, sparsifier = sparsified(METHODS[method_name](), seed=seed)
        for _ in range(9):
            if disturbed:
                torch.rand(5)  # what others draw from the global stream makes no difference
            train(model, optimizer, sparsifier, 1)
        return sparsifier.masks

    assert equal(run(0), run(0, disturbed=True))
    first, other = run(0), run(1)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_the_engine_draws_nothing_from_the_global_stream():
    model, optimizer, sparsifier = sparsified(methods.set_(DENSITY, update_every=1))
    state = torch.get_rng_state()
    Sparsifier(model, OPTIMIZERS["sgd"](model.parameters()), methods.set_(DENSITY), total_steps=3)
    train(model, optimizer, sparsifier, 3)
    assert torch.equal(torch.get_rng_state(), state)


@dataclass(frozen=True)
class Same(RandomScore):
    """No connection is better than another: ties decide everything."""

    def __call__(self, view):
        return torch.zeros(view.weight.shape)


def test_ties_are_broken_by_seed_step_and_layer():
    method = methods.set_(
        0.5, init=Magnitude(), allocation=Uniform(), update_every=1, drop=Same(), grow=Same(), fraction=Constant(0.5)
    )

    def run(seed):
        model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
        with torch.no_grad():
            model[0].weight.copy_(torch.linspace(1, 2, 144).view(12, 12))
            model[1].weight.copy_(model[0].weight)
        _, optimizer, sparsifier = sparsified(method, torch.optim.SGD(model.parameters(), 0.1), model=model, seed=seed)
        masks = [sparsifier.masks]
        for _ in range(2):
            sparsifier.before_step()
            optimizer.step()
            masks.append(sparsifier.masks)
        return masks

    first, again, other = run(0), run(0), run(1)
    assert equal(first, again)
    assert equal(first[0], other[0])
    assert equal(first[0]["0.weight"], first[0]["1.weight"])
    assert not torch.equal(first[1]["0.weight"], other[1]["0.weight"])
    assert not torch.equal(first[1]["0.weight"], first[1]["1.weight"])


def test_layers_of_one_shape_get_different_masks():
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(2)))
    _, _, sparsifier = sparsified(methods.rigl(0.2), model=model)
    assert not torch.equal(sparsifier.masks["0.weight"], sparsifier.masks["1.weight"])


# --- saving and loading ---------------------------------------------------------------------------------------------


def everything(model, optimizer, sparsifier):
    """All that training depends on; torch loads optimizer state of any dtype in the weights', so dtypes are left out."""
    state = {
        (i, key): value.double() if torch.is_tensor(value) else value
        for i, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
    }
    return copy.deepcopy([model.state_dict(), state, sparsifier.state_dict()])


ORDERS = ("weights first", "weights and optimizer first", "sparsifier first")


# The other half of the methods resumes in tests/resume/test_plain_loop.py.
@pytest.mark.parametrize(
    ("method_name", "optimizer_name", "order", "at"),
    rotated(METHODS, ("adamw", "odd"), ORDERS, (0, 3, 9), share=(0, 2)),
)
def test_a_resume_is_bitwise_exact(method_name, optimizer_name, order, at):
    make = METHODS[method_name]
    model, optimizer, sparsifier = sparsified(make(), optimizer_name, seed=4)
    train(model, optimizer, sparsifier, at)
    saved = through_a_file(state_dicts(model, optimizer, sparsifier))
    then = everything(model, optimizer, sparsifier)
    train(model, optimizer, sparsifier, 5)  # an update of every four steps is among them
    expected = everything(model, optimizer, sparsifier)

    torch.manual_seed(99)
    model = Small()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    if order != "sparsifier first":
        model.load_state_dict(saved["model"])
    if order == "weights and optimizer first":
        optimizer.load_state_dict(saved["optimizer"])
    sparsifier = Sparsifier(model, optimizer, make(), total_steps=TOTAL_STEPS, seed=4)
    if order == "sparsifier first":
        model.load_state_dict(saved["model"])
    sparsifier.load_state_dict(saved["sparsifier"])
    if order != "weights and optimizer first":
        optimizer.load_state_dict(saved["optimizer"])
    assert equal(everything(model, optimizer, sparsifier), then)
    train(model, optimizer, sparsifier, 5)
    assert equal(everything(model, optimizer, sparsifier), expected)


def test_weights_may_be_loaded_after_the_state():
    """A connection grown at zero stays active, although its weight is zero; inactive weights stay zero."""
    model, optimizer, sparsifier = sparsified(methods.rigl(DENSITY, update_every=3, fraction=Constant(0.5)))
    train(model, optimizer, sparsifier, 4)  # ends with an update: grown weights are zero
    saved = through_a_file(state_dicts(model, optimizer, sparsifier))
    masks = sparsifier.masks
    assert sum(int((model.get_parameter(n)[m] == 0).sum()) for n, m in masks.items()) > 0
    method = methods.rigl(DENSITY, update_every=3, fraction=Constant(0.5))
    other, fresh, loaded = sparsified(method, model=Small())
    loaded.load_state_dict(saved["sparsifier"])
    other.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    assert equal(loaded.masks, masks)
    train(model, optimizer, sparsifier, 5)
    train(other, fresh, loaded, 5)
    assert equal(everything(model, optimizer, sparsifier), everything(other, fresh, loaded))


def test_a_state_is_a_copy():
    model, optimizer, sparsifier = sparsified(
        methods.rigl(DENSITY, update_every=1, grow=Momentum(), fraction=Constant(0.5))
    )
    train(model, optimizer, sparsifier, 2)
    state = sparsifier.state_dict()
    before = copy.deepcopy(state)
    train(model, optimizer, sparsifier, 3)
    assert equal(state, before)
    sparsifier.load_state_dict(state)
    train(model, optimizer, sparsifier, 3, first=0)
    assert equal(state, before)


def test_other_total_steps_are_accepted_with_a_warning(caplog):
    model, optimizer, sparsifier = sparsified(methods.rigl(DENSITY))
    train(model, optimizer, sparsifier, 2)
    _, _, longer = sparsified(methods.rigl(DENSITY), total_steps=100)
    with caplog.at_level(logging.WARNING):
        longer.load_state_dict(sparsifier.state_dict())
    assert "24 steps and go on for 100" in caplog.text
    assert longer.step == 2


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


def changed(state, key, value):
    return {**state, key: value(copy.deepcopy(state[key])) if callable(value) else value}


def flip(masks):
    masks["head.weight"][0] = True
    return masks


REFUSALS = {
    "another method": lambda s: changed(s, "method", methods.set_(DENSITY).spec()),
    "another density": lambda s: changed(s, "method", methods.rigl(0.4, grow=Momentum()).spec()),
    "another clock": lambda s: changed(s, "method", methods.rigl(DENSITY, update_every=7, grow=Momentum()).spec()),
    "another seed": lambda s: changed(s, "seed", 5),
    "another format": lambda s: changed(s, "format", 99),
    "another number of optimizers": lambda s: changed(s, "steps", [1, 1]),
    "an unknown layer": lambda s: changed(s, "masks", lambda m: {**m, "tail": torch.ones(1, 1).bool()}),
    "a missing layer": lambda s: changed(s, "masks", lambda m: without(m, "head.weight")),
    "another shape": lambda s: changed(s, "masks", lambda m: {**m, "head.weight": torch.ones(2, 20).bool()}),
    "masks of floats": lambda s: changed(s, "masks", lambda m: {**m, "head.weight": torch.ones(3, 20)}),
    "masks that are no tensors": lambda s: changed(s, "masks", lambda m: {**m, "head.weight": [1, 0]}),
    "masks that are a list": lambda s: changed(s, "masks", lambda m: list(m.values())),
    "masks off their budget": lambda s: changed(s, "masks", flip),
    "a union without a layer": lambda s: changed(s, "union", lambda u: without(u, "head.weight")),
    "a union of another shape": lambda s: changed(s, "union", lambda u: {**u, "head.weight": torch.ones(1, 1).bool()}),
    "a buffer of an unknown layer": lambda s: changed(s, "buffers", {"grow/tail": torch.ones(1, 1)}),
    "a buffer of another shape": lambda s: changed(s, "buffers", lambda b: {**b, "grow/head.weight": torch.ones(1, 1)}),
    "steps that are no numbers": lambda s: changed(s, "steps", ["x"]),
    "a method that is none": lambda s: changed(s, "method", None),
    "no counters": lambda s: without(s, "updates"),
    "step counts that are none": lambda s: changed(s, "step_counts", None),
    "nothing": lambda s: {},
    "None": lambda s: None,
    "text": lambda s: "state",
    "a list": lambda s: [s],
}


@pytest.fixture(scope="module")
def trained():
    method = methods.rigl(DENSITY, grow=Momentum(), update_every=2)
    model, optimizer, sparsifier = sparsified(method)
    train(model, optimizer, sparsifier, 5)
    return sparsifier


@pytest.mark.parametrize("case", REFUSALS)
def test_a_state_that_does_not_belong_is_refused_and_changes_nothing(case, trained):
    state = REFUSALS[case](trained.state_dict())
    model, optimizer, sparsifier = sparsified(trained.method)
    train(model, optimizer, sparsifier, 1)
    before = everything(model, optimizer, sparsifier)
    with pytest.raises(StateError) as raised:
        sparsifier.load_state_dict(state)
    assert str(raised.value)
    assert equal(everything(model, optimizer, sparsifier), before)
    train(model, optimizer, sparsifier, 1)
    sparsifier.load_state_dict(trained.state_dict())  # the untouched state is accepted
    assert sparsifier.step == 5


@pytest.mark.parametrize(
    ("method", "named"),
    [
        (methods.rigl(0.4), r"density: 0\.3 in the checkpoint, 0\.4 here"),
        (methods.set_(DENSITY), "name: rigl in the checkpoint, set here"),
        (methods.rigl(DENSITY, update_every=7), "clock.every: 100 in the checkpoint, 7 here"),
    ],
)
def test_a_refusal_names_the_difference(method, named):
    _, _, sparsifier = sparsified(methods.rigl(DENSITY))
    _, _, other = sparsified(method)
    with pytest.raises(StateError, match=named):
        other.load_state_dict(sparsifier.state_dict())


def test_a_state_of_other_parts_of_a_parameter_is_refused():
    _, _, whole = sparsified(methods.rigl(DENSITY))
    _, _, partial = sparsified(methods.rigl(DENSITY), exclude=["attention.in_proj_weight[v]"])
    with pytest.raises(StateError):
        partial.load_state_dict(whole.state_dict())


def test_a_dense_part_of_a_parameter_stays_dense():
    model, optimizer, sparsifier = sparsified(
        methods.rigl(DENSITY, update_every=1, fraction=Constant(0.5)), exclude=["attention.in_proj_weight[v]"]
    )
    train(model, optimizer, sparsifier, 5)
    assert sparsifier.masks["attention.in_proj_weight"][16:].all()
    assert model.attention.in_proj_weight[16:].all()
    assert not model.attention.in_proj_weight[:16][~sparsifier.masks["attention.in_proj_weight"][:16]].any()


def test_an_optimizer_state_from_a_dense_run_can_be_masked():
    model = Small()
    optimizer = Odd(model.parameters())
    backward(model, optimizer, 0)
    optimizer.step()
    stale = optimizer.state_dict()
    _, _, sparsifier = sparsified(methods.rigl(DENSITY), optimizer, model=model)
    optimizer.load_state_dict(stale)
    sparsifier.mask_optimizer_state()
    for name, mask in sparsifier.masks.items():
        trace = optimizer.state[model.get_parameter(name)]["trace"]
        assert not trace[~mask].any()
        assert trace[mask].all()


@pytest.mark.parametrize("replace_step", [True, False])
def test_a_step_that_is_prepared_twice_is_updated_once(replace_step):
    """As when a gradient scaler skips a step for another optimizer's overflow, or two optimizers alternate."""
    model, optimizer, sparsifier = sparsified(methods.set_(DENSITY, update_every=1, replace_step=replace_step))
    backward(model, optimizer, 0)
    sparsifier.before_step()
    masks = sparsifier.masks
    backward(model, optimizer, 0)
    sparsifier.before_step()
    assert sparsifier.updates == 1
    assert all(torch.equal(masks[name], mask) for name, mask in sparsifier.masks.items())
    optimizer.step()
    assert all(p.grad is None for p in model.parameters()) is replace_step
    backward(model, optimizer, 1)
    sparsifier.before_step()
    assert sparsifier.updates == 2
