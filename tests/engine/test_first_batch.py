"""First masks that need the graph of the loss or a call of the model: inputs, side effects and errors."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dst
from dst import ConfigurationError, StateError, methods
from dst.allocation import PerLayer, Uniform
from dst.init import Grasp, Synflow
from dst.planning.first_mask import masks_on_the_way
from dst.topology.layers import find_layers
from tests.checks import hooks_of
from tests.small import Small, backward, batch, sparsified

build = functools.partial(sparsified, total_steps=12)


def step(model: nn.Module, optimizer: Any, sparsifier: dst.Sparsifier, *args: Any, **kwargs: Any) -> None:
    optimizer.zero_grad()
    result = model(*args, **kwargs)
    while not isinstance(result, Tensor):
        result = next(iter(result.values())) if isinstance(result, dict) else result[0]
    loss = result.square().mean()
    sparsifier.before_backward(loss)
    loss.backward()
    sparsifier.before_step()
    optimizer.step()


# --- the loss -------------------------------------------------------------------------------------------------------


def test_a_loop_without_the_loss_gets_an_error_that_names_the_call() -> None:
    model, optimizer, sparsifier = build(methods.grasp(0.3))
    backward(model, optimizer, 0)
    with pytest.raises(
        StateError, match=r"Grasp needs the loss .* call sparsifier\.before_backward\(loss\) before loss"
    ):
        sparsifier.before_step()


@pytest.mark.parametrize("method", [methods.rigl(0.3), methods.snip(0.3), methods.synflow(0.3), methods.grasp(1.0)])
def test_other_methods_take_the_loss_and_leave_it(method: dst.Method) -> None:
    _, _, sparsifier = build(method)
    sparsifier.before_backward(torch.tensor(1.0))  # without a graph: using it would raise
    assert not sparsifier.state_dict()["buffers"]


def test_no_gradient_is_touched_and_backward_finds_its_graph() -> None:
    model, _, sparsifier = build(methods.grasp(0.3, temperature=1.0))
    images, labels = batch(0)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    functional.cross_entropy(model(images), labels).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    loss = functional.cross_entropy(model(images), labels)
    sparsifier.before_backward(loss)
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["head.weight"]
    assert model.head.weight.grad.eq(1).all()
    loss.backward()
    assert all(torch.equal(p.grad, expected[n]) for n, p in model.named_parameters())


def test_the_first_micro_batch_counts() -> None:
    masks = []
    for parts in (1, 3):
        model, _optimizer, sparsifier = build(methods.grasp(0.3))
        for part in range(parts):
            images, labels = batch(part)
            loss = functional.cross_entropy(model(images), labels)
            sparsifier.before_backward(loss)
            loss.backward()
        model.norm.reset_running_stats()
        sparsifier.before_step()
        masks.append(sparsifier.masks)
    assert all(torch.equal(mask, masks[1][n]) for n, mask in masks[0].items())


def test_what_was_measured_survives_a_resume_before_the_step() -> None:
    whole, resumed = build(methods.grasp(0.3)), build(methods.grasp(0.3))
    images, labels = batch(0)
    loss = functional.cross_entropy(whole[0](images), labels)
    whole[2].before_backward(loss)
    loss.backward()
    resumed[2].load_state_dict(copy.deepcopy(whole[2].state_dict()))
    other = functional.cross_entropy(resumed[0](batch(1)[0]), batch(1)[1])
    resumed[2].before_backward(other)  # the second micro-batch
    other.backward()
    whole[2].before_step()
    resumed[2].before_step()
    assert not whole[2].state_dict()["buffers"]
    assert all(torch.equal(mask, resumed[2].masks[n]) for n, mask in whole[2].masks.items())


def test_outputs_are_divided_in_the_step_that_makes_the_mask_alone() -> None:
    method = dst.Method("late", 0.3, init=Grasp(50.0), sparsify_at=1)
    model, optimizer, sparsifier = build(method, model=nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)))
    x, seen = torch.randn(5, 4), []
    for _ in range(3):
        plain = model[2](model[1](model[0](x)))
        with torch.no_grad():
            assert torch.equal(model(x), plain)  # an evaluation is none of its business
        output = model(x)
        seen.append((plain / output).mean().item())
        optimizer.zero_grad()
        loss = output.square().sum()
        sparsifier.before_backward(loss)
        loss.backward()
        sparsifier.before_step()
        optimizer.step()
    assert seen == pytest.approx([1, 50, 1])
    assert hooks_of(model) == 0


def test_fused_attention_is_off_only_in_that_step_even_after_an_error() -> None:
    enabled = torch.backends.cuda.flash_sdp_enabled
    seen = []

    class Watched(Small):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(enabled())
            return super().forward(images)

    model, optimizer, sparsifier = build(methods.grasp(0.3), model=Watched())
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 7))
    assert enabled()
    for i in range(2):
        backward(model, optimizer, i, sparsifier)
        assert enabled()
        sparsifier.before_step()
        optimizer.step()
    assert seen == [False, False, True]


def test_a_loss_that_has_no_second_derivative_is_refused() -> None:
    """Fused attention outside the module that holds the weights."""
    model, _, sparsifier = build(methods.grasp(0.3), model=nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)))
    x = model(torch.randn(2, 1, 5, 4))
    loss = functional.scaled_dot_product_attention(x, x, x).square().sum()
    with pytest.raises(ConfigurationError, match=r"Grasp needs second derivatives .*sdpa_kernel.*another init"):
        sparsifier.before_backward(loss)


def test_a_loss_without_graph_is_refused() -> None:
    _, _, sparsifier = build(methods.grasp(0.3))
    with pytest.raises(ConfigurationError, match="the loss that backward"):
        sparsifier.before_backward(torch.tensor(1.0))


def test_a_batch_that_overflows_is_measured_anew() -> None:
    expected = build(methods.grasp(0.3))
    backward(*expected[:2], 0, expected[2])
    expected[2].before_step()
    model, optimizer, sparsifier = build(methods.grasp(0.3))
    images, labels = batch(5)
    norms = copy.deepcopy(model.norm.state_dict())
    loss = functional.cross_entropy(model(images), labels) * float("inf")
    sparsifier.before_backward(loss)
    loss.backward()
    sparsifier.before_step()
    assert not sparsifier.is_sparse
    model.norm.load_state_dict(norms)
    backward(model, optimizer, 0, sparsifier)
    sparsifier.before_step()
    assert all(torch.equal(mask, sparsifier.masks[n]) for n, mask in expected[2].masks.items())


# --- the call -------------------------------------------------------------------------------------------------------


class Probe(nn.Module):
    """A model that records its calls, draws random numbers, and keeps running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.seen: list[Any] = []

    def forward(self, x: Tensor, *, keep: Tensor, scale: float = 1.0) -> dict[str, Any]:
        self.calls += 1
        self.seen.append((x.dtype, len(x), keep.tolist(), scale, self.training))
        torch.rand(3)
        return {"out": self.two(self.drop(self.one(self.norm(x)).relu())) * scale, "note": "text"}


def test_the_call_is_repeated_without_a_trace() -> None:
    model, optimizer, sparsifier = build(methods.synflow(0.5, iterations=3), model=Probe())
    reference, _plain, _ = build(methods.dense(), model=Probe())
    reference.load_state_dict(model.state_dict())
    model.drop.eval()
    reference.drop.eval()
    keep = torch.tensor([True, False])
    torch.manual_seed(1)
    x = torch.randn(8, 4)
    step(model, optimizer, sparsifier, x, keep=keep, scale=2.0)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    torch.randn(8, 4)
    reference(x, keep=keep, scale=2.0)
    assert torch.equal(after, torch.get_rng_state())
    assert all(torch.equal(b, dict(reference.named_buffers())[n]) for n, b in model.named_buffers())
    assert [m.training for m in model.modules()] == [m.training for m in reference.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert hooks_of(model) == 0
    first, *others = model.seen
    assert first == (torch.float32, 8, [True, False], 2.0, True)
    # keep has another first dimension than x, so all eight samples stay
    assert set(map(repr, others)) == {repr((torch.float64, 8, [True, False], 2.0, False))}
    assert len(others) == 3


def test_scores_of_one_sample_are_those_of_the_batch() -> None:
    sizes = []

    class Sized(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return super().forward(x)

    masks = []
    for count in (1, 32):
        torch.manual_seed(0)
        model = Sized(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        _, optimizer, sparsifier = build(methods.synflow(0.3, iterations=4), model=model)
        step(model, optimizer, sparsifier, torch.randn(count, 4))
        masks.append(sparsifier.masks)
    assert sizes == [1, *[1] * 4, 32, 32, 1, *[1] * 4]
    assert all(torch.equal(mask, masks[1][n]) for n, mask in masks[0].items())


def test_a_sequence_that_comes_first_is_not_taken_for_samples() -> None:
    """Cut to its first element, a recurrent network would use none of its recurrent weights."""
    model = nn.GRU(4, 6)
    _, optimizer, sparsifier = build(methods.synflow(0.3, iterations=4), model=model)
    lengths = []
    model.register_forward_pre_hook(lambda module, args: lengths.append(len(args[0])))
    step(model, optimizer, sparsifier, torch.randn(5, 2, 4))
    assert lengths == [5, 5, 1, *[5] * 4]
    assert int(sparsifier.masks["weight_hh_l0"].sum()) > 10


def test_token_ids_stay_as_they_are() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(10, 6), nn.Linear(6, 5)
            self.seen: list[list[int]] = []

        def forward(self, ids: Tensor) -> Tensor:
            self.seen.append(ids.flatten().tolist())
            return self.head(self.words(ids))

    model, optimizer, sparsifier = build(methods.synflow(0.3, iterations=2), model=Words())
    step(model, optimizer, sparsifier, torch.tensor([[1, 2, 3], [7, 8, 9]]))
    assert model.seen[0] == model.seen[1] == model.seen[-1] == [1, 2, 3, 7, 8, 9]


def test_the_outermost_module_is_called_however_deep_the_weights_lie() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

        def training_step(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model, _optimizer, sparsifier = build(methods.synflow(0.5, iterations=2), model=Outer())
    loss = model.training_step(torch.randn(5, 4)).square().mean()
    loss.backward()
    sparsifier.before_step()
    assert sparsifier.active == 21
    assert sparsifier.masks.keys() == {"inner.0.weight", "inner.2.weight"}


def test_a_shared_weight_is_scored_by_all_its_uses() -> None:
    """R = 1'·W'W·1 with W = [[1, 2], [3, 4]]: the derivative by W[i, j] is the sum of row i and that of column i."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    _, optimizer, sparsifier = build(methods.synflow(0.5, iterations=1), model=model)
    step(model, optimizer, sparsifier, torch.randn(3, 2))
    # scores: w[i, j] * (column sum of i + row sum of j) = 1·(4+3), 2·(4+7), 3·(6+3), 4·(6+7)
    assert sparsifier.masks["0.weight"].tolist() == [[False, False], [True, True]]


def test_a_model_called_in_pieces_is_refused() -> None:
    model = nn.ModuleDict({"one": nn.Linear(4, 6), "two": nn.Linear(6, 3)})
    _, _, sparsifier = build(methods.synflow(0.5), model=model)
    model["two"](model["one"](torch.randn(5, 4))).square().mean().backward()
    with pytest.raises(StateError, match=r"Synflow repeats the model's call, .*one module .*include="):
        sparsifier.before_step()


def test_a_model_for_float32_only_is_refused() -> None:
    class Stubborn(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    model, optimizer, sparsifier = build(methods.synflow(0.5), model=Stubborn(4, 3))
    with pytest.raises(ConfigurationError, match=r"calls the model in float64 .*dtype"):
        step(model, optimizer, sparsifier, torch.randn(5, 4))
    assert model.training


@pytest.mark.parametrize(("scale", "reason"), [(0.0, "all zero"), (1e200, "not finite")])
def test_scores_that_say_nothing_are_refused(scale: float, reason: str) -> None:
    class Scaled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.double()).mul(scale).mul(scale)

    model = Scaled(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    _, _, sparsifier = build(methods.synflow(0.5), model=model)
    model(torch.randn(5, 4))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ConfigurationError, match=f"SynFlow's scores are {reason} at pruning step 1"):
        sparsifier.before_step()


def test_copies_of_the_model_bring_no_second_watcher() -> None:
    model, optimizer, sparsifier = build(methods.synflow(0.3, iterations=2))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other(batch(7)[0])
    step(model, optimizer, sparsifier, batch(0)[0])
    assert sparsifier.is_sparse
    other(batch(8)[0]).sum().backward()


def test_finalize_takes_the_hooks_away() -> None:
    for method in (methods.synflow(0.3), methods.grasp(0.3)):
        model, _, sparsifier = build(method)
        assert hooks_of(model) > 0
        sparsifier.finalize()
        assert hooks_of(model) == 0


def test_loading_a_state_with_and_without_mask_decides_whether_to_watch() -> None:
    model, optimizer, sparsifier = build(methods.synflow(0.3, iterations=2))
    before = copy.deepcopy(sparsifier.state_dict())
    step(model, optimizer, sparsifier, batch(0)[0])
    after = sparsifier.state_dict()
    other, _, resumed = build(methods.synflow(0.3, iterations=2))
    resumed.load_state_dict(after)
    assert hooks_of(other) == 0
    sparsifier.load_state_dict(before)
    step(model, optimizer, sparsifier, batch(0)[0])
    assert sparsifier.is_sparse


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [methods.grasp, methods.synflow, methods.snip])
def test_csr_is_refused_at_construction(make: Any) -> None:
    with pytest.raises(ConfigurationError, match=r'the first mask, by (Grasp|Synflow|Snip), .*use backend="masked"'):
        make(0.1, backend="csr")


@pytest.mark.parametrize("make", [methods.grasp, methods.synflow])
def test_several_optimizers_are_refused(make: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    pair = [torch.optim.SGD(layer.parameters(), 0.1) for layer in model]
    with pytest.raises(ConfigurationError, match="2 optimizers"):
        dst.Sparsifier(model, pair, make(0.5), total_steps=5)


@pytest.mark.parametrize("iterations", [0, -1, 2.0, True])
def test_iterations_are_counts(iterations: Any) -> None:
    with pytest.raises(ConfigurationError, match="iterations="):
        Synflow(iterations)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_temperatures_are_positive(temperature: float) -> None:
    with pytest.raises(ConfigurationError, match="temperature="):
        Grasp(temperature)


@pytest.mark.parametrize("init", [Grasp(), Synflow()])
def test_a_layer_alone_has_no_score(init: Any) -> None:
    with pytest.raises(TypeError, match="at once"):
        init.scores(None)


# --- masks on the way -----------------------------------------------------------------------------------------------


def test_what_was_pruned_on_the_way_stays_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where scores tie at zero: queries and keys of attention over equal tokens have no flow."""
    seen: list[dict[str, Tensor]] = []

    def noted(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        seen.append(masks_on_the_way(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr("dst.engine.first_mask.masks_on_the_way", noted)
    model, optimizer, sparsifier = build(methods.synflow(0.2, iterations=6, allocation=Uniform()))
    step(model, optimizer, sparsifier, batch(0)[0])
    seen.append({x.label: x.part(sparsifier.masks[x.parameter]) for x in sparsifier.layers})
    assert len(seen) == 6
    for before, after in itertools.pairwise(seen):
        for label, mask in after.items():
            assert not (mask & ~before[label]).any(), label
            assert mask.sum() < before[label].sum()


def test_layers_with_their_own_densities_are_pruned_by_powers() -> None:
    layers, _ = find_layers(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 20)))
    scores = {x.label: torch.rand(x.shape) for x in layers}
    method = dst.Method("x", 0.14, allocation=PerLayer({"0.weight": 0.04, "1.weight": 0.19}))
    counts = [
        [int(m.sum()) for m in masks_on_the_way(method, layers, scores, progress, seed=0).values()]
        for progress in (0.0, 0.5, 1.0)
    ]
    assert counts == [[100, 200], [20, 88], [4, 38]]  # 200 · sqrt(0.19) = 87.2
