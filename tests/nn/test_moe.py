"""Mixtures of experts: the loss by hand, routing, capacity, sparse experts, and the loss in training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dst
from dst.errors import ConfigurationError
from dst.metrics.counting import layer_macs
from dst.models import GPT
from dst.models.classifier import LanguageModel
from dst.nn import SwitchFeedForward, auxiliary_losses, load_balancing_loss


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, tokens):
        return self.factor * tokens


def scaling_experts(**options):
    """Two experts that multiply by 10 and 100, and a router that sends a token where its larger feature is."""
    layer = SwitchFeedForward(2, 3, 2, **options)
    layer.experts = nn.ModuleList([Scale(10.0), Scale(100.0)])
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(2))
    return layer


def gate(token):
    return torch.tensor(token).softmax(0).max().item()


def test_load_balancing_loss_by_hand():
    probabilities = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]], requires_grad=True)
    loss = load_balancing_loss(probabilities, torch.tensor([0, 0, 1]))
    # f = (2/3, 1/3) and P = (17/30, 13/30)
    assert loss.item() == pytest.approx(2 * (2 / 3 * 17 / 30 + 1 / 3 * 13 / 30))
    loss.backward()
    torch.testing.assert_close(probabilities.grad, torch.tensor([[4 / 9, 2 / 9]] * 3))  # N f_i / tokens
    uniform = torch.full((8, 4), 0.25)
    assert load_balancing_loss(uniform, torch.arange(8) % 4).item() == pytest.approx(1.0)
    collapsed = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 8)
    assert load_balancing_loss(collapsed, torch.zeros(8, dtype=torch.int64)).item() == pytest.approx(4.0)


def test_tokens_pass_through_their_expert_and_overflow_is_zero():
    tokens = [[3.0, 0.0], [2.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    inputs = torch.tensor(tokens).view(2, 2, 2)
    layer = scaling_experts(capacity_factor=1.0, eval_capacity_factor=2.0)
    gates = [gate(token) for token in tokens]
    expected = [[30.0 * gates[0], 0.0], [20.0 * gates[1], 0.0], [0.0, 100.0 * gates[2]], [10.0 * gates[3], 0.0]]
    torch.testing.assert_close(layer.eval()(inputs), torch.tensor(expected).view(2, 2, 2))
    # In training there is room for two of the three that want the first expert: the last comes too late.
    expected[3] = [0.0, 0.0]
    torch.testing.assert_close(layer.train()(inputs), torch.tensor(expected).view(2, 2, 2))


@pytest.mark.parametrize(
    ("factor", "tokens", "expected"), [(1.25, 8, 3), (1.0, 8, 2), (1.0, 9, 3), (0.1, 8, 1), (8.0, 8, 8)]
)
def test_capacity(factor, tokens, expected):
    layer = SwitchFeedForward(2, 3, 4, capacity_factor=factor, eval_capacity_factor=4.0)
    assert layer.capacity(tokens) == expected
    assert layer.eval().capacity(tokens) == tokens
    seen = []
    layer.train().experts[2].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    layer(torch.randn(tokens, 2))
    assert seen == [expected]


def test_dropped_tokens_pass_gradient_to_no_expert():
    layer = scaling_experts(capacity_factor=0.5)
    inputs = torch.tensor([[3.0, 0.0], [2.0, 0.0]], requires_grad=True)
    layer(inputs).sum().backward()
    assert inputs.grad[0].abs().sum() > 0
    assert inputs.grad[1].tolist() == [0.0, 0.0]


def test_the_loss_is_there_in_training_alone_and_is_taken_away():
    layer = scaling_experts(balance=0.5)
    inputs = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    layer.eval()(inputs)
    assert auxiliary_losses(layer) == []
    layer.train()(inputs)
    copied = copy.deepcopy(nn.Sequential(layer))  # as an average of weights does
    assert auxiliary_losses(copied) == []
    (loss,) = auxiliary_losses(nn.Sequential(layer))
    expected = load_balancing_loss(inputs.softmax(1), torch.tensor([0, 0, 1]))
    assert loss.item() == pytest.approx(0.5 * expected.item())
    assert auxiliary_losses(layer) == []
    loss.backward()
    assert layer.router.weight.grad.abs().sum() > 0


def test_the_balancing_loss_evens_out_the_load():
    torch.manual_seed(0)
    layer = SwitchFeedForward(4, 4, 2, balance=1.0)
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]))
    inputs = torch.randn(256, 4) + torch.tensor([1.5, 0, 0, 0])
    optimizer = torch.optim.SGD(layer.router.parameters(), 1.0)

    def load():
        return (layer.router(inputs).argmax(1) == 0).float().mean().item()

    before = load()
    for _ in range(100):
        optimizer.zero_grad()
        layer(inputs)
        sum(auxiliary_losses(layer)).backward()
        optimizer.step()
    assert before > 0.9
    assert 0.35 < load() < 0.65


def test_jitter_acts_in_training_only():
    layer = SwitchFeedForward(4, 4, 2, jitter=0.5, capacity_factor=2.0)
    inputs = torch.randn(16, 4)
    assert not torch.equal(layer(inputs), layer(inputs))
    layer.eval()
    assert torch.equal(layer(inputs), layer(inputs))


def test_routing_is_in_float32_under_autocast():
    layer = SwitchFeedForward(8, 8, 2)
    kinds = []
    layer.router.register_forward_hook(lambda module, args, output: kinds.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(torch.randn(6, 8, dtype=torch.bfloat16))
    assert kinds == [torch.float32]
    assert output.dtype == torch.bfloat16
    assert auxiliary_losses(layer)[0].dtype == torch.float32
    half = SwitchFeedForward(8, 8, 2).to(torch.bfloat16)
    assert half(torch.randn(6, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_cost_does_not_depend_on_the_routing():
    model = GPT(7, 6, width=8, depth=2, heads=2, experts=3, eval_capacity_factor=1.0)
    weights = dict(model.named_parameters())
    for example in (torch.zeros(1, 6, dtype=torch.int64), torch.arange(6).view(1, 6)):
        macs = layer_macs(model, example)
        for expert in range(3):
            name = f"blocks.1.feed_forward.experts.{expert}.expand.weight"
            assert macs[name] == 2 * weights[name].numel()  # two of six tokens
        assert macs["blocks.1.feed_forward.router.weight"] == 6 * 3 * 8


def test_experts_lie_in_every_second_block():
    model = GPT(7, 6, width=8, depth=4, heads=2, experts=3)
    kinds = [isinstance(block.feed_forward, SwitchFeedForward) for block in model.blocks]
    assert kinds == [False, True, False, True]
    every = GPT(7, 6, width=8, depth=2, heads=2, experts=3, expert_every=1)
    assert all(isinstance(block.feed_forward, SwitchFeedForward) for block in every.blocks)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_with_experts_stays_causal(training):
    model = GPT(11, 8, width=8, depth=2, heads=2, experts=4, capacity_factor=1.0, eval_capacity_factor=1.0)
    model.train(training)
    tokens = torch.randint(11, (1, 8))
    changed = tokens.clone()
    changed[0, 5:] = (changed[0, 5:] + 3) % 11
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_lightning_adds_the_loss():
    torch.manual_seed(0)
    model = GPT(7, 6, width=8, depth=2, heads=2, experts=3, balance=0.5, capacity_factor=3.0)
    module = LanguageModel(model, lambda parameters: torch.optim.SGD(parameters, 0.1))
    tokens, targets = torch.randint(7, (4, 6)), torch.randint(7, (4, 6))
    for _ in range(2):  # each step has its own
        loss = module.training_step((tokens, targets), 0)
        cross_entropy = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        (auxiliary,) = auxiliary_losses(model)
        assert auxiliary.item() >= 0.4  # α times a loss of about 1
        assert loss.item() == pytest.approx((cross_entropy + auxiliary).item(), rel=1e-6)
        loss.backward()
    assert module.metrics["train_"].compute()["loss"].item() == pytest.approx(cross_entropy.item(), rel=1e-5)


@pytest.mark.parametrize("backend", ["masked", "csr"])
def test_sparse_experts_keep_exact_budgets(backend):
    torch.manual_seed(0)
    model = GPT(7, 6, width=16, depth=2, heads=2, experts=3)
    method = dst.methods.rigl(0.2, update_every=3, backend=backend)
    planned = {row.name: row.active for row in dst.plan(model, method).rows}
    model = dst.prepare(model, method)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sparsifier = dst.Sparsifier(model, optimizer, method, total_steps=20)
    for _ in range(12):
        tokens = torch.randint(7, (8, 6))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        sum(auxiliary_losses(model), loss).backward()
        sparsifier.before_step()
        optimizer.step()
    assert sparsifier.updates >= 3
    table = {row["name"]: row for row in sparsifier.layer_table()}
    experts = [name for name in table if ".experts." in name]
    assert len(experts) == 6
    assert all(table[name]["nonzero"] == planned[name] for name in table)
    assert all(table[name]["nonzero"] < table[name]["weights"] for name in experts)
    if backend == "masked":
        weights = dict(model.named_parameters())
        assert all(int((weights[name] != 0).sum()) <= planned[name] for name in experts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 1}, "experts=1 must be an integer of at least 2"),
        ({"experts": 2.0}, "experts=2.0 must be"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 must be positive"),
        ({"eval_capacity_factor": float("inf")}, "eval_capacity_factor=inf"),
        ({"balance": -1.0}, "balance=-1.0"),
        ({"jitter": 1.0}, "jitter=1.0"),
    ],
)
def test_refuses_what_is_out_of_range(options, message):
    with pytest.raises(ConfigurationError, match=message):
        SwitchFeedForward(4, 4, **{"experts": 2, **options})
    with pytest.raises(ConfigurationError, match="expert_every=3 puts experts in none of 2 blocks"):
        GPT(7, 6, width=8, depth=2, heads=2, experts=2, expert_every=3)
