"""Latent storage: invariants of every step of methods that train inactive weights too, and what is refused."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

import dst
from dst import ConfigurationError, Method, Sparsifier, StateError, init, methods, scores
from dst.lightning import SparseTraining
from dst.patterns import Unstructured
from dst.relaxations import HardConcrete, LearnedThreshold, Movement, StraightThrough, pressure
from dst.schedules import Constant, Every
from tests.checks import active_counts, check_budget, check_inactive_are_zero, equal, settles_at
from tests.methods_list import DENSITY, LATENT, METHODS, TOTAL_STEPS
from tests.sampling import rotated
from tests.small import Small, backward, batch, sparsified, train, values


@pytest.mark.parametrize(("name", "optimizer_name"), rotated(LATENT, ["sgd", "adamw", "odd"]))
def test_what_holds_at_every_step(name, optimizer_name):
    method = METHODS[name]()
    model, optimizer, sparsifier = sparsified(method, optimizer_name)
    fired, budget, churn = 0, None, 0.0
    for step in range(TOTAL_STEPS):
        backward(model, optimizer, step)
        before, masks = values(model), sparsifier.masks
        sparsifier.before_step()
        assert sparsifier.updates == fired  # the topology is updated after the step
        prepared, chosen = values(model), sparsifier.masks
        was_sparse = sparsifier.is_sparse
        if equal(masks, chosen):
            assert equal(before, prepared)
        optimizer.step()
        due = was_sparse and (method.clock.fires(step, TOTAL_STEPS) or step == settles_at(method))
        fired += due
        assert sparsifier.updates == fired
        churn = max(churn, sparsifier.churn)
        now = sparsifier.masks
        assert due or equal(chosen, now)
        check_inactive_are_zero(model, now)
        counts = active_counts(sparsifier)
        assert counts == {line["name"]: line["nonzero"] for line in sparsifier.layer_table()}
        if sparsifier.is_sparse:
            budget = counts if budget is None or (due and method.schedule is not None) else budget
            assert counts == budget
    assert sum(sparsifier.step_counts.values()) == sparsifier.step == TOTAL_STEPS
    assert sparsifier.is_sparse
    check_budget(sparsifier, method)
    assert (churn > 0) == (fired > 0) == method.is_dynamic
    kept = sparsifier.state_dict()["latent"]
    assert bool(kept) != method.relaxation.until_mask
    last = values(model)
    sparsifier.finalize()
    assert equal(last, values(model))


@pytest.mark.parametrize("name", ["top_kast", "sr_ste", "top_kast_at_times"])
def test_the_mask_holds_the_largest_latent_weights_and_the_parameter_shows_them(name):
    model, optimizer, sparsifier = sparsified(METHODS[name](), "adamw")
    for _ in range(3):
        train(model, optimizer, sparsifier, 1)
        latent = sparsifier.state_dict()["latent"]
        if sparsifier.last_update is not None and sparsifier.last_update.step == sparsifier.step - 1:
            for layer in sparsifier.layers:
                weight, mask = (layer.part(x[layer.parameter]) for x in (latent, sparsifier.masks))
                assert weight[mask].abs().min() >= weight[~mask].abs().max()
        for parameter, mask in sparsifier.masks.items():
            assert torch.equal(model.get_parameter(parameter).detach(), latent[parameter] * mask)
            assert latent[parameter][~mask].any()
    assert sparsifier.updates


def test_optimizer_state_of_inactive_weights_is_kept():
    model, optimizer, sparsifier = sparsified(METHODS["sr_ste"](), "adamw")
    train(model, optimizer, sparsifier, 4)
    for name, mask in sparsifier.masks.items():
        assert optimizer.state[model.get_parameter(name)]["exp_avg"][~mask].any()


def test_weights_outside_the_backward_set_do_not_move():
    model, optimizer, sparsifier = sparsified(METHODS["top_kast"](), "adamw")
    train(model, optimizer, sparsifier, 3)
    for _ in range(4):
        before = sparsifier.state_dict()["latent"]
        backward(model, optimizer, 3)
        sparsifier.before_step()
        for layer in sparsifier.layers:
            moved = before[f"{layer.label}/moved"]
            assert int(moved.sum()) == pytest.approx(layer.weights / 2, abs=3)
            assert (moved | ~layer.part(sparsifier.masks[layer.parameter])).all()
            gradient = layer.part(model.get_parameter(layer.parameter).grad)
            assert not gradient[~moved].any()
        optimizer.step()
        for layer in sparsifier.layers:  # the decay neither
            gradient = layer.part(model.get_parameter(layer.parameter).grad)
            assert not gradient[~before[f"{layer.label}/moved"]].any()
        after = sparsifier.state_dict()["latent"]
        for layer in sparsifier.layers:
            moved = before[f"{layer.label}/moved"]
            old, new = (layer.part(x[layer.parameter]) for x in (before, after))
            assert torch.equal(old[~moved], new[~moved])
            assert not torch.equal(old[moved], new[moved])


def test_weights_written_between_steps_become_latent_weights():
    model, optimizer, sparsifier = sparsified(METHODS["sr_ste"]())
    train(model, optimizer, sparsifier, 2)
    before = sparsifier.state_dict()["latent"]["hidden.weight"]
    other = torch.where(torch.rand(20, 8) < 0.5, model.hidden.weight.detach(), torch.randn(20, 8))
    written = other != model.hidden.weight.detach()
    model.load_state_dict({**model.state_dict(), "hidden.weight": other})
    found = sparsifier.state_dict()["latent"]["hidden.weight"]
    assert torch.equal(found, torch.where(written, other, before))


def test_averages_are_as_sparse_as_the_model():
    model, optimizer, sparsifier = sparsified(METHODS["sr_ste"](), "adamw")
    average = torch.optim.swa_utils.AveragedModel(model)
    sparsifier.track_average(average)
    before = sparsifier.masks
    for _ in range(12):
        train(model, optimizer, sparsifier, 1)
        average.update_parameters(model)
    train(model, optimizer, sparsifier, 1)
    assert not equal(before, sparsifier.masks)
    for name, mask in sparsifier.masks.items():
        assert not average.module.get_parameter(name)[~mask].any()


def test_a_step_that_is_left_out_changes_nothing():
    """As when a gradient scaler finds an overflow: ``before_step()`` was called, and the optimizer's step is not."""
    model, optimizer, sparsifier = sparsified(METHODS["movement"]())
    train(model, optimizer, sparsifier, 5)
    before = copy.deepcopy([values(model), sparsifier.state_dict()["latent"]])
    backward(model, optimizer, 5)
    sparsifier.before_step()
    assert equal(before[0], values(model))
    assert equal(before[1], sparsifier.state_dict()["latent"])


@pytest.mark.parametrize("name", LATENT)
def test_a_closure_gives_what_a_plain_step_gives(name):
    plain = sparsified(METHODS[name]())
    train(*plain, 6)
    model, optimizer, sparsifier = sparsified(METHODS[name]())

    def closure():
        images, labels = batch(sparsifier.step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        sparsifier.before_step()
        return loss

    for _ in range(6):
        optimizer.step(closure)
    assert equal(values(plain[0]), values(model))
    assert equal(plain[2].state_dict()["latent"], sparsifier.state_dict()["latent"])


def test_gates_are_random_in_training_and_not_in_evaluation_or_in_copies():
    model, optimizer, sparsifier = sparsified(methods.l0(DENSITY, stop=0.5, initial=0.0))
    images = batch(0)[0]
    sampled = values(model)
    train(model, optimizer, sparsifier, 2)
    training = values(model)
    assert not torch.equal(sampled["hidden.weight"] != 0, training["hidden.weight"] != 0)  # another sample
    latent = sparsifier.state_dict()["latent"]
    gate = (latent["hidden.weight/gate"].sigmoid() * 1.2 - 0.1).clamp(0, 1)
    duplicate = copy.deepcopy(model)
    for caller in (lambda: model(images), lambda: model.hidden(torch.zeros(1, 8))):
        model.eval()
        caller()
        assert torch.allclose(model.hidden.weight, latent["hidden.weight"] * gate)
        model.train()
        caller()
        assert equal(values(model), training)
    duplicate.eval()(images)
    assert equal(values(duplicate), training)
    assert equal(latent, sparsifier.state_dict()["latent"])


def test_a_state_saved_in_evaluation_resumes_exactly():
    whole = sparsified(METHODS["l0"]())
    train(*whole, 4)
    whole[0].eval()(batch(0)[0])
    saved = copy.deepcopy([whole[0].state_dict(), whole[1].state_dict(), whole[2].state_dict()])
    whole[0].train()
    train(*whole, TOTAL_STEPS - 4)
    model, optimizer, sparsifier = sparsified(METHODS["l0"]())
    sparsifier.load_state_dict(saved[2])
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, sparsifier, TOTAL_STEPS - 4)
    assert equal(values(whole[0]), values(model))


def test_an_earlier_state_is_accepted_after_the_mask_is_made():
    whole = sparsified(METHODS["str"]())
    train(*whole, 4)
    saved = copy.deepcopy([whole[0].state_dict(), whole[1].state_dict(), whole[2].state_dict()])
    train(*whole, TOTAL_STEPS - 4)
    last = values(whole[0])
    for part, state in zip(whole, saved, strict=True):
        part.load_state_dict(state)
    assert not whole[2].is_sparse
    train(*whole, TOTAL_STEPS - 4)
    assert equal(last, values(whole[0]))


@pytest.mark.parametrize(
    ("relaxation", "kind"),
    [
        (methods.str_(DENSITY, stop=0.5), {"dense": 13, "sparse": 11, "dense_gradient": 0}),
        (methods.sr_ste(DENSITY, stop=0.5, pattern=Unstructured()), {"dense": 0, "sparse": 12, "dense_gradient": 12}),
        (methods.top_kast(DENSITY), {"dense": 0, "sparse": 0, "dense_gradient": 24}),
        (methods.movement(DENSITY, start=4, stop=0.5), {"dense": 6, "sparse": 12, "dense_gradient": 6}),
    ],
)
def test_steps_are_counted_by_their_cost(relaxation, kind):
    model, optimizer, sparsifier = sparsified(relaxation)
    train(model, optimizer, sparsifier, TOTAL_STEPS)
    assert sparsifier.step_counts == kind


def test_the_pressure_follows_the_cubic_schedule():
    assert pressure(0.1 + 0.9 / 8, 0.5, 0.1, 1000) == pytest.approx(0)
    assert pressure(0.2, 1.0, 0.1, 1000) == pytest.approx(0.05 * 0.6931, rel=1e-3)
    assert pressure(0.05, 1.0, 0.1, 10) == pytest.approx(-0.1 * 0.6931, rel=1e-3)


@pytest.mark.parametrize(
    "relaxation", [LearnedThreshold(-4.0), Movement(0.01, 0.1), HardConcrete()], ids=["threshold", "movement", "gates"]
)
def test_learned_densities_reach_their_target(relaxation):
    torch.manual_seed(0)
    model = nn.Linear(30, 20)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    method = Method("learned", 0.2, init=init.Importance(), sparsify_at=300, relaxation=relaxation)
    sparsifier = Sparsifier(model, optimizer, method, total_steps=301)
    target = 0.2 * torch.randn(20, 30)
    for step in range(300):
        inputs = torch.randn(16, 30, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(inputs) - inputs @ target.T).square().mean().backward()
        sparsifier.before_step()
        optimizer.step()
    model.eval()(inputs)
    assert float((model.weight != 0).float().mean()) == pytest.approx(0.2, abs=0.08)


def refuse(**settings):
    return lambda: Method("new", 0.3, **settings)


DYNAMIC = {"clock": Every(5), "drop": scores.Magnitude(), "grow": scores.Magnitude(), "fraction": Constant(1.0)}
REFUSALS = {
    "csr": (
        lambda: dataclasses.replace(methods.top_kast(0.1), backend="csr"),
        "stores only non-zeros, and StraightThrough keeps inactive",
    ),
    "no relaxation": (refuse(backend="latent"), 'backend="latent" needs a relaxation'),
    "importance": (refuse(init=init.Importance()), "Importance ranks latent weights"),
    "rescaled": (refuse(relaxation=StraightThrough(), rescale_init=True), "rescale_init and StraightThrough"),
    "no phase": (refuse(relaxation=LearnedThreshold()), "LearnedThreshold learns what is active until sparsify_at"),
    "moving": (refuse(relaxation=HardConcrete(), sparsify_at=0.5, replace_step=False, **DYNAMIC), "clock=Never"),
    "replacing": (refuse(relaxation=StraightThrough(), **DYNAMIC), "replace_step=False"),
    "backward": (lambda: methods.top_kast(0.3, backward_density=0.2), r"backward_density=0\.2 must be at least"),
    "share": (lambda: StraightThrough(1.5), r"backward_density=1\.5 must lie in"),
    "decay": (lambda: methods.sr_ste(0.3, decay=-1), "inactive_decay=-1 must be at least 0"),
    "threshold": (lambda: methods.movement(0.3, soft=True, threshold=0.6), r"threshold=0\.6 must lie in"),
    "rate": (lambda: methods.l0(0.3, learning_rate=0), "learning_rate=0 must be positive"),
    "interval": (lambda: methods.l0(0.3, gamma=0.1), r"gamma=0\.1"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_work_is_refused(case):
    make, message = REFUSALS[case]
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_a_backend_of_ordinary_parameters_is_made_latent():
    assert SparseTraining(methods.sr_ste(0.1)).method.backend == "latent"
    with pytest.raises(TypeError, match="backend"):
        methods.sr_ste(0.1, backend="masked")


@pytest.mark.parametrize("change", [lambda s: s.pop("conv.weight"), lambda s: s.update({"conv.weight": torch.ones(2)})])
def test_latent_weights_that_do_not_fit_are_refused(change):
    model, optimizer, sparsifier = sparsified(METHODS["movement"]())
    train(model, optimizer, sparsifier, 2)
    state = sparsifier.state_dict()
    change(state["latent"])
    before = values(model)
    with pytest.raises(StateError, match=r"latent weights do not fit the model: conv\.weight"):
        sparsifier.load_state_dict(state)
    assert equal(before, values(model))


@pytest.mark.parametrize("name", ["top_kast", "str", "movement", "l0"])
def test_half_precision_and_a_change_of_dtype(name):
    model, optimizer, sparsifier = sparsified(METHODS[name](), model=Small().to(torch.bfloat16))
    train(model, optimizer, sparsifier, 3)
    model.double()
    optimizer.state.clear()
    train(model, optimizer, sparsifier, TOTAL_STEPS - 3)
    assert all(p.isfinite().all() for p in model.parameters())
    assert {t.dtype for n, t in sparsifier.state_dict()["latent"].items() if n in sparsifier.masks} <= {torch.float64}
    for parameter, mask in sparsifier.masks.items():
        assert not model.get_parameter(parameter)[~mask].any()


def test_the_dry_run_names_the_storage():
    assert {row.storage for row in dst.plan(Small(), methods.sr_ste(DENSITY, pattern=Unstructured())).rows} == {
        "latent"
    }
