"""Loops written by hand: accumulation, clipping, scaling, reduced precision, several optimizers, wrappers."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.checkpoint import checkpoint

import dst
from dst.init import Snip
from dst.scores import Momentum
from tests.checks import active_counts, check_budget, check_inactive_are_zero, differences
from tests.methods_list import DYNAMIC, METHODS, TOTAL_STEPS
from tests.sampling import rotated
from tests.small import Small, backward, batch, sparsified, state_dicts, train


@pytest.mark.parametrize(
    "method",
    [
        dst.methods.rigl(0.3, update_every=3),
        dst.methods.rigl(0.3, update_every=3, grow=Momentum(0.5), init=Snip(), replace_step=False),
        dst.methods.set_(0.3, update_every=3),
    ],
    ids=lambda m: m.name,
)
def test_an_update_sees_the_accumulated_gradient(method: dst.Method) -> None:
    """Three micro-batches give the masks and weights of the whole batch."""

    def run(parts: int) -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 30), nn.Tanh(), nn.Linear(30, 5)).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=12)
        for step in range(12):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(12, 10, generator=generator, dtype=torch.float64)
            y = torch.randint(5, (12,), generator=generator)
            optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (functional.cross_entropy(model(a), b) / parts).backward()
            sparsifier.before_step()
            optimizer.step()
        assert sparsifier.step == 12
        return {"masks": sparsifier.masks, "updates": sparsifier.updates, "weights": model.state_dict()}

    whole, parts = run(1), run(3)
    assert whole["updates"] == parts["updates"] >= 2
    assert all(torch.equal(m, parts["masks"][n]) for n, m in whole["masks"].items())
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(parts["weights"][name], weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["rigl", "set", "static_from_start", "snip"])
def test_clipping_sees_masked_gradients(name: str) -> None:
    """Also at updates that replace a step: gradients to clip and log exist until the step begins."""
    model, optimizer, sparsifier = sparsified(name)
    for step in range(TOTAL_STEPS):
        backward(model, optimizer, step)
        dense = {n: p.grad.clone() for n, p in model.named_parameters()}
        sparsifier.before_step()
        expected = {n: torch.where(sparsifier.masks[n], g, 0) if n in sparsifier.masks else g for n, g in dense.items()}
        for n, p in model.named_parameters():
            assert torch.equal(p.grad, expected[n])
        norm = clip_grad_norm_(model.parameters(), 0.01)
        torch.testing.assert_close(norm, torch.cat([g.flatten() for g in expected.values()]).norm())
        assert norm < torch.cat([g.flatten() for g in dense.values()]).norm() - 1e-4
        clip_grad_value_(model.parameters(), 1e-4)
        assert max(float(p.grad.abs().max()) for p in model.parameters()) <= 1e-4
        before = copy.deepcopy(model.state_dict())
        replaced = METHODS[name]().replace_step and sparsifier.last_update and sparsifier.last_update.step == step
        optimizer.step()
        if replaced or (name == "snip" and step == 0):
            assert not list(differences(before, model.state_dict()))
            assert all(p.grad is None for p in model.parameters())
        else:
            assert list(differences(before, model.state_dict()))
        check_inactive_are_zero(model, sparsifier.masks)


def scaled_run(name: str, overflows: Collection[int], where: str, optimizer: str = "adamw") -> dict[str, Any]:
    """Train with a gradient scaler; before the steps in ``overflows`` an attempt is made whose gradients overflow."""
    model, made, sparsifier = sparsified(name, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1000)
    for step in range(TOTAL_STEPS):
        for overflow in [True, False] if step in overflows else [False]:
            made.zero_grad()
            images, labels = batch(step)
            # Attempts that overflow must not leave traces in running statistics, which are not dst's.
            norms = copy.deepcopy(model.norm.state_dict())
            scaler.scale(functional.cross_entropy(model(images), labels)).backward()
            if overflow:
                model.norm.load_state_dict(norms)
                for n, p in model.named_parameters():
                    if where == "everywhere" or (where == "inactive" and n in sparsifier.masks) or n == where:
                        bad = torch.full_like(p.grad, float("inf"))
                        if where == "inactive":
                            bad = torch.where(sparsifier.masks[n], p.grad, bad)
                        p.grad = bad
            scaler.unscale_(made)
            before = copy.deepcopy(state_dicts(model, made, sparsifier))
            sparsifier.before_step()
            scaler.step(made)
            scaler.update()
            if overflow:
                after = state_dicts(model, made, sparsifier)
                before["sparsifier"]["skipped"] = after["sparsifier"]["skipped"]
                found = [d for d in differences(before, after) if "first_mask" not in d]
                assert not found, found
            check_inactive_are_zero(model, sparsifier.masks)
    assert sparsifier.step == TOTAL_STEPS
    if overflows:
        assert scaler.get_scale() == 2.0 ** (12 - len(overflows))
    return {**state_dicts(model, made, sparsifier), "skips": sparsifier.skipped}


@pytest.mark.parametrize(
    ("name", "where"),
    rotated(
        ["rigl", "set", "momentum_growth", "static_from_start", "rigl_with_step"],
        ["everywhere", "inactive", "head.bias"],
    ),
)
def test_overflows_under_a_gradient_scaler_leave_no_trace(name: str, where: str) -> None:
    """The clock does not advance, no mask changes, and training continues as without the attempt."""
    clean = scaled_run(name, [], where)
    overflown = scaled_run(name, [1, 4, 5, 8], where)
    for run in (clean, overflown):
        run["sparsifier"]["skipped"] = 0
    updates = {"rigl": 2, "set": 2, "momentum_growth": 2, "rigl_with_step": 2}  # at steps 4 and 8
    assert overflown.pop("skips") == updates.get(name, 0)
    assert clean.pop("skips") == 0
    found = list(differences(clean, overflown))
    assert not found, found


@pytest.mark.parametrize("name", ["snip", "rigl_snip", "static_at_step"])
def test_an_overflow_where_the_first_mask_is_due_puts_it_off(name: str) -> None:
    made_at = 5 if name == "static_at_step" else 0
    model, optimizer, sparsifier = sparsified(name)
    train(model, optimizer, sparsifier, made_at)
    backward(model, optimizer, made_at)
    for p in model.parameters():
        p.grad.fill_(float("nan"))
    sparsifier.before_step()  # and the scaler leaves the step out
    assert sparsifier.step == made_at
    assert sparsifier.is_sparse == (name == "static_at_step")  # magnitudes need no gradient
    train(model, optimizer, sparsifier, 1)
    assert sparsifier.is_sparse
    train(model, optimizer, sparsifier, TOTAL_STEPS - made_at - 1)
    check_inactive_are_zero(model, sparsifier.masks)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", rotated(METHODS, share=(1, 3)))
def test_bfloat16_weights(name: str) -> None:
    model, optimizer, sparsifier = sparsified(name, model=Small().bfloat16())
    for _ in range(TOTAL_STEPS):
        train(model, optimizer, sparsifier, 1)
        check_inactive_are_zero(model, sparsifier.masks)
        assert active_counts(sparsifier) == {row["name"]: row["nonzero"] for row in sparsifier.layer_table()}
    check_budget(sparsifier, METHODS[name]())
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["rigl", "momentum_growth", "set"])
def test_bfloat16_autocast(name: str) -> None:
    model, optimizer, sparsifier = sparsified(name)
    first = sparsifier.masks
    for step in range(TOTAL_STEPS):
        images, labels = batch(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        sparsifier.before_step()
        optimizer.step()
        check_inactive_are_zero(model, sparsifier.masks)
    assert sparsifier.updates > 3
    assert sum(map(int, active_counts(sparsifier).values())) == sum(int(m.sum()) for m in first.values())


def test_parameter_groups_with_settings_of_their_own() -> None:
    torch.manual_seed(0)
    model = Small()
    groups = [
        {"params": list(model.conv.parameters()) + list(model.attention.parameters()), "lr": 0.0},
        {"params": list(model.norm.parameters()), "weight_decay": 0.0},
        {"params": [*model.hidden.parameters(), *model.head.parameters()], "lr": 0.1, "momentum": 0.5},
    ]
    optimizer = torch.optim.SGD(groups, 0.05, momentum=0.9, weight_decay=0.01)
    sparsifier = dst.Sparsifier(model, optimizer, METHODS["rigl_with_step"](), total_steps=TOTAL_STEPS)
    counts = active_counts(sparsifier)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, sparsifier, 4)  # there are no updates in steps 1 to 3, and the one at step 0 drops weights
    kept = sparsifier.masks["conv.weight"] & before["conv.weight"].ne(0)
    assert torch.equal(model.conv.weight[kept], before["conv.weight"][kept])
    assert torch.equal(model.conv.bias, before["conv.bias"])
    assert not torch.equal(model.norm.bias, before["norm.bias"])
    train(model, optimizer, sparsifier, TOTAL_STEPS - 4)
    check_inactive_are_zero(model, sparsifier.masks)
    assert active_counts(sparsifier) == counts
    assert [g["lr"] for g in optimizer.param_groups] == [0.0, 0.05, 0.1]


def test_a_group_that_is_added_later_trains_and_its_weights_stay_dense() -> None:
    model, optimizer, sparsifier = sparsified("rigl")
    extra = nn.Parameter(torch.ones(5, 5))
    optimizer.add_param_group({"params": [extra]})
    for step in range(6):
        backward(model, optimizer, step)
        extra.grad = torch.ones_like(extra)
        sparsifier.before_step()
        optimizer.step()
    assert extra.ne(0).all()
    assert extra.ne(1).all()
    check_inactive_are_zero(model, sparsifier.masks)


def test_two_optimizers_keep_their_own_clocks() -> None:
    """Each optimizer updates the topology of its own layers when it steps."""
    torch.manual_seed(0)
    model = Small()
    one = torch.optim.SGD([*model.conv.parameters(), *model.norm.parameters(), *model.attention.parameters()], 0.05)
    two = torch.optim.AdamW([*model.hidden.parameters(), *model.head.parameters()], 0.01)
    sparsifier = dst.Sparsifier(model, [one, two], METHODS["rigl"](), total_steps=TOTAL_STEPS)
    counts = active_counts(sparsifier)
    for step in range(12):
        model.zero_grad()
        functional.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
        before = sparsifier.masks
        sparsifier.before_step(two)
        moved = {n for n, m in sparsifier.masks.items() if not torch.equal(m, before[n])}
        assert moved <= {"hidden.weight", "head.weight"}
        two.step()
        if step % 3 == 0:
            sparsifier.before_step(one)
            moved = {n for n, m in sparsifier.masks.items() if not torch.equal(m, before[n])}
            one.step()
        check_inactive_are_zero(model, sparsifier.masks)
    assert sparsifier.state_dict()["steps"] == [4, 12]
    assert active_counts(sparsifier) == counts
    assert sparsifier.updates == 1 + 3  # at steps 0 of one; 0, 4 and 8 of two


def test_lbfgs_is_refused() -> None:
    model = Small()
    with pytest.raises(dst.ConfigurationError, match=r"LBFGS evaluates the loss several times.*SGD or AdamW"):
        dst.Sparsifier(model, torch.optim.LBFGS(model.parameters()), METHODS["rigl"](), total_steps=5)


def test_a_closure_that_prepares_the_step_itself() -> None:
    """SGD takes a closure too, and calls it once."""
    model, optimizer, sparsifier = sparsified("rigl")
    reference = sparsified("rigl")
    train(*reference, 10)
    for step in range(10):

        def closure(step: int = step) -> float:
            backward(model, optimizer, step)
            sparsifier.before_step()
            return 0.0

        optimizer.step(closure)
    assert not list(differences(state_dicts(*reference), state_dicts(model, optimizer, sparsifier)))


def test_a_step_that_was_not_prepared_is_an_error() -> None:
    model, optimizer, sparsifier = sparsified("rigl")
    train(model, optimizer, sparsifier, 2)
    backward(model, optimizer, 2)
    with pytest.raises(dst.StateError, match=r"without sparsifier\.before_step"):
        optimizer.step()
    check_inactive_are_zero(model, sparsifier.masks)
    sparsifier.finalize()
    optimizer.step()  # dense from here on


@pytest.mark.parametrize("name", rotated(DYNAMIC, share=(0, 2)))
def test_a_step_that_was_prepared_and_not_taken_is_updated_once(name: str) -> None:
    """Loops that skip a step because the norm is too large prepare the same step again."""
    model, optimizer, sparsifier = sparsified(name)
    train(model, optimizer, sparsifier, 4)
    updates = sparsifier.updates
    backward(model, optimizer, 4)
    sparsifier.before_step()
    masks = sparsifier.masks
    backward(model, optimizer, 5)
    sparsifier.before_step()
    assert sparsifier.updates <= updates + 1
    assert all(torch.equal(m, sparsifier.masks[n]) for n, m in masks.items())
    optimizer.step()
    assert sparsifier.step == 5
    check_inactive_are_zero(model, sparsifier.masks)


class Chatty(torch.optim.SGD):
    """A subclass whose step calls its base class's: PyTorch then calls every step hook twice."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(1e-3)
        return loss


def test_an_optimizer_that_calls_its_base_class() -> None:
    model = Small()
    torch.optim.SGD(model.parameters(), 0.05)  # from now on the base class's step calls hooks
    optimizer = Chatty(model.parameters(), 0.05, momentum=0.9)
    sparsifier = dst.Sparsifier(model, optimizer, METHODS["rigl"](), total_steps=TOTAL_STEPS)
    for step in range(TOTAL_STEPS):
        train(model, optimizer, sparsifier, 1)
        assert sparsifier.step == step + 1
        check_inactive_are_zero(model, sparsifier.masks)
    assert sum(sparsifier.step_counts.values()) == TOTAL_STEPS


class Checkpointed(Small):
    """Recomputes the attention and the hidden layer in the backward pass."""

    def forward(self, images: Tensor) -> Tensor:
        sequence = self.norm(self.conv(images)).relu().flatten(2).transpose(1, 2)
        attend = lambda s: s + self.attention(s, s, s, need_weights=False)[0]  # noqa: E731
        sequence = checkpoint(attend, sequence, use_reentrant=False)
        return self.head(checkpoint(lambda s: self.hidden(s.mean(1)).relu(), sequence, use_reentrant=False))


@pytest.mark.parametrize("name", ["rigl", "momentum_growth", "snip"])
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = Checkpointed()
    torch.manual_seed(0)
    plain = Small()
    runs = [sparsified(name, model=m) for m in (model, plain)]
    for run in runs:
        train(*run, TOTAL_STEPS)
    assert not list(differences(state_dicts(*runs[0]), state_dicts(*runs[1])))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_module_is_compiled_once() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    reference = copy.deepcopy(model)
    compiled = torch.compile(model)
    method = dst.methods.rigl(0.3, update_every=2, stop=1.0, replace_step=False)

    def run(net: nn.Module, sparsified: nn.Module) -> dst.Sparsifier:
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        sparsifier = dst.Sparsifier(sparsified, optimizer, method, total_steps=20)
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            sparsified(torch.randn(16, 8, generator=generator)).square().mean().backward()
            sparsifier.before_step()
            optimizer.step()
        return sparsifier

    sparsifier = run(model, compiled)
    assert sparsifier.updates == 10
    assert set(sparsifier.masks) == {"0.weight", "2.weight"}
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompile_limit"]
    check_inactive_are_zero(model, sparsifier.masks)
    other = run(reference, reference)
    assert sum(int((sparsifier.masks[n] != m).sum()) for n, m in other.masks.items()) <= 4  # rounding may tip a few
    torch._dynamo.reset()
