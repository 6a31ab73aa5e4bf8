"""Warm-up of grown weights (SMET): the optimizer's change of a weight grows linearly to the full one."""

from __future__ import annotations

import copy

import lightning
import pytest
import torch
from torch import nn
from torch.nn import functional

import dst
from dst import ConfigurationError, StateError, methods
from dst.lightning import SparseTraining
from dst.schedules import Constant
from tests.small import OPTIMIZERS, Small, train


def build(optimizer="sgd", **settings):
    torch.manual_seed(0)
    model = nn.Linear(10, 10, bias=False)
    made = (
        torch.optim.SGD(model.parameters(), 0.5) if optimizer == "sgd" else torch.optim.AdamW(model.parameters(), 0.01)
    )
    settings = {"update_every": 10, "start": 3, "fraction": Constant(0.4), "regrow_dropped": False, **settings}
    method = methods.set_(0.3, **settings)
    return model, made, dst.Sparsifier(model, made, method, total_steps=40)


def moves(optimizer, steps, **settings):
    """How far every weight goes at every step under gradients of one, and the masks."""
    model, made, sparsifier = build(optimizer, **settings)
    found = []
    for _ in range(steps):
        model.weight.grad = torch.ones(10, 10)
        before = model.weight.detach().clone()
        sparsifier.before_step()
        dropped = ~sparsifier.masks["weight"]
        made.step()
        found.append((sparsifier.masks["weight"], (model.weight.detach() - before).masked_fill(dropped, 0)))
    return found


@pytest.mark.parametrize("replace_step", [False, True])
def test_the_first_steps_of_a_grown_weight(replace_step):
    """Updated at step 3; with n = 4, it moves by 1/4, 2/4, 3/4 of the optimizer's step and then by all of it."""
    found = moves("sgd", 10, grown_warmup=4, replace_step=replace_step)
    old, new = found[2][0], found[3][0]
    grown, kept = new & ~old, new & old
    assert int(grown.sum()) == 12
    first = 3 + replace_step
    if replace_step:
        assert not found[3][1].any()
    for step in range(first, 10):
        share = min(1.0, (step - first + 1) / 4)
        torch.testing.assert_close(found[step][1][grown], torch.full((12,), -0.5 * share))
        torch.testing.assert_close(found[step][1][kept], torch.full((18,), -0.5))


def test_it_tames_the_first_step_of_adam():
    """Without moments, Adam's bias-corrected first step of a grown weight is three times the others'."""

    def first_step(warmup):
        found = moves("adam", 40, grown_warmup=warmup, start=30)
        grown = found[30][0] & ~found[29][0]
        return float(found[30][1][grown].abs().mean()), float(found[29][1][found[29][0]].abs().mean())

    plain, usual = first_step(0)
    warm, _ = first_step(5)
    assert plain / usual != pytest.approx(1, rel=0.2)
    assert warm == pytest.approx(plain / 5, rel=1e-3)


def test_a_warmup_of_one_step_is_none():
    plain, warm = moves("adam", 12), moves("adam", 12, grown_warmup=1)
    assert all(torch.equal(a, b) for x, y in zip(plain, warm, strict=True) for a, b in zip(x, y, strict=True))


def test_weights_of_several_ages():
    """Updates closer than n steps: every weight keeps its own count, and the dropped are forgotten."""
    model, optimizer, sparsifier = build(grown_warmup=6, update_every=2, start=0)
    birth = {}
    for step in range(12):
        model.weight.grad = torch.ones(10, 10)
        old = sparsifier.masks["weight"]
        before = model.weight.detach().clone()
        sparsifier.before_step()
        new = sparsifier.masks["weight"]
        for position in (new & ~old).flatten().nonzero().flatten().tolist():
            birth[position] = step
        for position in (old & ~new).flatten().nonzero().flatten().tolist():
            birth.pop(position, None)
        optimizer.step()
        change = (model.weight.detach() - before).flatten()
        for position in new.flatten().nonzero().flatten().tolist():
            share = min(1.0, (step - birth[position] + 1) / 6) if position in birth else 1.0
            assert float(change[position]) == pytest.approx(-0.5 * share, abs=1e-5)
        young = sparsifier.state_dict()["warming"]["weight"][0].tolist()
        assert young == sorted(p for p, born in birth.items() if step - born + 1 < 6)


def test_set_density_is_followed():
    model, optimizer, sparsifier = build(grown_warmup=4, start=30)
    before = sparsifier.masks["weight"]
    sparsifier.set_density(0.6)
    grown = sparsifier.masks["weight"] & ~before
    model.weight.grad = torch.ones(10, 10)
    sparsifier.before_step()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach()[grown], torch.full((30,), -0.125))


@pytest.mark.parametrize("replace_step", [False, True])
def test_a_closure_gives_the_same(replace_step):
    """The update happens within the closure, after the step has begun."""

    def run(closure):
        model, optimizer, sparsifier = build("adam", grown_warmup=4, replace_step=replace_step, update_every=3)
        for step in range(12):

            def attempt(step=step, model=model, sparsifier=sparsifier):
                model.weight.grad = torch.randn(10, 10, generator=torch.Generator().manual_seed(step))
                sparsifier.before_step()
                return torch.zeros(())

            if closure:
                optimizer.step(attempt)
            else:
                attempt()
                optimizer.step()
        return model.weight.detach()

    assert torch.equal(run(True), run(False))


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Small()

    def training_step(self, batch, index):
        return functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_lightning_agrees_with_a_loop():
    method = methods.rigl(0.3, update_every=3, grown_warmup=4, replace_step=False)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(8, 2, 6, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(12)
    ]
    torch.manual_seed(0)
    module = Module()
    plain = copy.deepcopy(module)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SparseTraining(method)],
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    optimizer = plain.configure_optimizers()
    sparsifier = dst.Sparsifier(plain, optimizer, method, total_steps=12)
    for index, batch in enumerate(batches):
        optimizer.zero_grad()
        plain.training_step(batch, index).backward()
        sparsifier.before_step()
        optimizer.step()
    assert sparsifier.updates > 2
    for (name, a), b in zip(plain.named_parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "make", [methods.rigl, methods.snfs, methods.dsr, methods.mest, methods.granet, methods.rigl_itop]
)
def test_it_may_be_set_wherever_weights_grow(make):
    assert make(0.3, grown_warmup=5).grown_warmup == 5
    for wrong in (-1, 0.5, True):
        with pytest.raises(ConfigurationError, match="grown_warmup="):
            make(0.3, grown_warmup=wrong)


def test_csr_is_refused():
    with pytest.raises(ConfigurationError, match="which need masks"):
        methods.rigl(0.3, grown_warmup=5, backend="csr")


def test_a_damaged_state_is_refused():
    torch.manual_seed(0)
    model = Small()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    method = methods.rigl(0.3, update_every=2, grown_warmup=5)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=20)
    train(model, optimizer, sparsifier, 3)
    state = sparsifier.state_dict()
    label, (positions, born) = next(iter(state["warming"].items()))
    for wrong in (
        {label: [positions, born[1:]]},
        {"unknown": [positions, born]},
        {label: [positions + 10**6, born]},
        {label: 3},
    ):
        with pytest.raises(StateError, match="grown weights"):
            sparsifier.load_state_dict({**state, "warming": wrong})
    sparsifier.load_state_dict(state)
