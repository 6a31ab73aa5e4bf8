"""Sparse activations: hand-worked winners, duty cycles and boosting, gradients, what is saved."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dst.errors import ConfigurationError
from dst.models import MLP, ConvNet
from dst.nn import KWinners, TopKReLU, k_winners, top_k_relu, updated_duty_cycle


@pytest.mark.parametrize(
    ("activations", "k", "expected"),
    [
        ([4.0, 3.0, 2.0, 1.5], 2, [4.0, 3.0, 0.0, 0.0]),
        ([1.0, -2.0, 5.0, -3.0], 3, [1.0, -2.0, 5.0, 0.0]),  # winners keep their sign
        ([-1.0, -2.0, -3.0, -4.0], 1, [-1.0, 0.0, 0.0, 0.0]),
        ([1.0, -2.0, 5.0, -3.0], 4, [1.0, -2.0, 5.0, -3.0]),
    ],
)
def test_winners_by_hand(activations, k, expected):
    assert k_winners(torch.tensor([activations]), k).tolist() == [expected]


def test_boosting_by_hand():
    # β = ln 4 and k/n = 1/2: units that always won are halved, units that never won doubled: 2, 1.5, 4, 3.
    activations, duty = torch.tensor([[4.0, 3.0, 2.0, 1.5]]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert k_winners(activations, 2, duty, math.log(4)).tolist() == [[0.0, 0.0, 2.0, 1.5]]
    # Of equal activations, those win whose units won less: 1.41, 2.83, 2.83, 1.41.
    duty = torch.tensor([1.0, 0.0, 0.0, 1.0])
    assert k_winners(torch.tensor([[2.0, 2.0, 2.0, 2.0]]), 2, duty, math.log(2)).tolist() == [[0.0, 2.0, 2.0, 0.0]]


def test_convolutions_compete_over_channels_and_positions_and_are_boosted_by_channel():
    images = torch.tensor([[[[1.0, 5.0]], [[2.0, 3.0]]], [[[1.0, 2.0]], [[4.0, 3.0]]]])
    assert k_winners(images, 1).tolist() == [[[[0.0, 5.0]], [[0.0, 0.0]]], [[[0.0, 0.0]], [[4.0, 0.0]]]]
    # Factors 4^(1/4 - 1) and 4^(1/4): 0.35 and 1.41.
    boosted = k_winners(images, 1, torch.tensor([1.0, 0.0]), math.log(4))
    assert boosted.tolist() == [[[[0.0, 0.0]], [[0.0, 3.0]]], [[[0.0, 0.0]], [[4.0, 0.0]]]]


def test_top_k_relu_by_hand():
    activations = torch.tensor([[4.0, -3.0, 2.0, 1.0], [-4.0, -3.0, 2.0, -1.0]])
    assert top_k_relu(activations, 2).tolist() == [[4.0, 0.0, 2.0, 0.0], [0.0, 0.0, 2.0, 0.0]]
    assert TopKReLU(4, density=0.25)(activations).tolist() == [[4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]]


@pytest.mark.parametrize("function", [k_winners, top_k_relu])
def test_the_gradient_reaches_winners_alone_and_is_not_boosted(function):
    activations = torch.tensor([[4.0, 3.0, 2.0, 1.5]], requires_grad=True)
    function(activations, 2).backward(torch.tensor([[10.0, 20.0, 30.0, 40.0]]))
    assert activations.grad.tolist() == [[10.0, 20.0, 0.0, 0.0]]
    boosted = torch.tensor([[4.0, 3.0, 2.0, 1.5]], requires_grad=True)
    k_winners(boosted, 2, torch.tensor([1.0, 1.0, 0.0, 0.0]), math.log(4)).sum().backward()
    assert boosted.grad.tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_duty_cycle_by_hand():
    def won(*samples):
        return torch.tensor(samples).bool()

    duty = updated_duty_cycle(torch.zeros(4), won([1, 1, 0, 0], [1, 0, 1, 0]), seen=2, period=4)
    assert duty.tolist() == [1.0, 0.5, 0.5, 0.0]  # the first samples count alone
    duty = updated_duty_cycle(duty, won([0, 1, 1, 0], [0, 1, 0, 1]), seen=4, period=4)
    assert duty.tolist() == [0.5, 0.75, 0.5, 0.25]  # the mean of four
    duty = updated_duty_cycle(duty, won([1, 0, 0, 1], [1, 0, 0, 1]), seen=6, period=4)
    assert duty.tolist() == [0.75, 0.375, 0.25, 0.625]  # (d (4 - 2) + wins) / 4
    duty = updated_duty_cycle(duty, won(*[[1, 0, 0, 0]] * 8), seen=14, period=4)
    assert duty.tolist() == [1.0, 0.0, 0.0, 0.0]  # a batch longer than the period
    channels = updated_duty_cycle(torch.zeros(2), won([[[1, 0]], [[1, 1]]]), seen=1, period=4)
    assert channels.tolist() == [0.5, 1.0]


@pytest.mark.parametrize("shape", [(6, 10), (6, 10, 4), (6, 10, 3, 2)])
def test_training_and_evaluation_keep_their_shares(shape):
    layer = KWinners(10, density=0.2)
    inputs = torch.randn(shape)
    entries = inputs[0].numel()
    assert ((layer(inputs) != 0).flatten(1).sum(1) == round(0.2 * entries)).all()
    layer.eval()
    assert ((layer(inputs) != 0).flatten(1).sum(1) == round(0.3 * entries)).all()
    assert (KWinners(10, density=0.8).eval()(inputs) != 0).all()  # 1.2 of all


def test_only_training_moves_the_duty_cycle_and_boosting_evens_it_out():
    torch.manual_seed(0)
    favoured = torch.zeros(20)
    favoured[:4] = 2.0
    shares = {}
    for boost in (0.0, 5.0):
        layer = KWinners(20, density=0.2, boost=boost, period=200)
        for _ in range(60):
            layer(torch.rand(20, 20) + favoured)
        assert layer.seen == 1200
        assert layer.duty_cycle.sum().item() == pytest.approx(4.0, abs=1e-4)  # k winners a sample
        before = layer.duty_cycle.clone()
        layer.eval()(torch.rand(20, 20))
        assert torch.equal(layer.duty_cycle, before)
        assert layer.seen == 1200
        shares[boost] = layer.duty_cycle[4:]
    assert shares[0.0].max() == 0
    assert shares[5.0].min() > 0


def test_a_saved_state_resumes_exactly():
    batches = [torch.randn(5, 8) for _ in range(6)]
    whole = KWinners(8, density=0.25, period=12)
    outputs = [whole(batch) for batch in batches]
    first = KWinners(8, density=0.25, period=12)
    for batch in batches[:3]:
        first(batch)
    assert set(first.state_dict()) == {"duty_cycle", "seen"}
    rest = KWinners(8, density=0.25, period=12)
    rest.load_state_dict(first.state_dict())
    assert all(torch.equal(rest(batch), output) for batch, output in zip(batches[3:], outputs[3:], strict=True))
    assert torch.equal(rest.duty_cycle, whole.duty_cycle)


def test_half_precision_keeps_the_type():
    layer = KWinners(8, density=0.25)
    output = layer(torch.randn(3, 8, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert ((output != 0).sum(1) == 2).all()


def test_models_take_activations_and_keep_their_parameters():
    plain, sparse = MLP((1, 8, 8), 10, width=20), MLP((1, 8, 8), 10, width=20, activation=KWinners)
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in sparse.named_parameters()]
    active = []
    sparse.activations[1].register_forward_hook(lambda module, args, output: active.append(output))
    sparse(torch.randn(4, 1, 8, 8))
    assert ((active[0] != 0).sum(1) == 2).all()
    network = ConvNet((1, 8, 8), 10, width=4, activation=lambda channels: TopKReLU(channels, density=0.25))
    assert network(torch.randn(4, 1, 8, 8)).shape == (4, 10)
    assert [module.units for module in network.activations] == [4, 8, 16]
    assert isinstance(ConvNet((1, 8, 8), 10).activations[0], nn.ReLU)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KWinners(4, density=0.0), "density=0.0 must lie"),
        (lambda: TopKReLU(4, density=1.5), "density=1.5 must lie"),
        (lambda: KWinners(4, inference_factor=0.5), "inference_factor=0.5 must be at least 1"),
        (lambda: KWinners(4, boost=-1.0), "boost=-1.0 must be at least 0"),
        (lambda: KWinners(4, boost=float("nan")), "boost=nan"),
        (lambda: KWinners(4, period=0), "period=0 must be at least 1"),
        (lambda: KWinners(4)(torch.ones(2, 4)), "density of 0.1 keeps none of 4"),
        (lambda: TopKReLU(4, 0.5)(torch.ones(2, 5)), r"takes \(N, 4\).*got \(2, 5\)"),
        (lambda: KWinners(4, 0.5)(torch.ones(4)), r"got \(4,\)"),
        (lambda: k_winners(torch.ones(2, 4), 5), r"k=5 must lie in 1\.\.4"),
        (lambda: k_winners(torch.ones(2, 4), 0), r"k=0 must lie in 1\.\.4"),
        (lambda: k_winners(torch.ones(2, 4), 1, boost=1.0), "needs a duty_cycle"),
    ],
)
def test_refuses_what_is_out_of_range(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()
