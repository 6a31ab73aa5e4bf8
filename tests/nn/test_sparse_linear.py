"""The sparse layer against the dense layer with a mask."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import dst
from dst.errors import ConfigurationError
from dst.nn.sparse_linear import FeatureMajorLinear, SparseLinear, remap
from dst.topology.selection import random_indices, tie_order

pytestmark = pytest.mark.usefixtures("engine")


def pair(inputs, outputs, density=0.4, dtype=torch.float64, **options):
    """A dense layer with zeros outside a mask, and the sparse layer of its non-zeros."""
    dense = nn.Linear(inputs, outputs, dtype=dtype)
    mask = torch.rand(outputs, inputs) < density
    with torch.no_grad():
        dense.weight *= mask
    return dense, SparseLinear.from_linear(dense, mask, **options), mask


@pytest.mark.parametrize("shape", [(1,), (0, 17), (1, 17), (7, 17), (129, 17), (2, 3, 17), (0, 3, 17)])
def test_forward_and_gradients_match_the_dense_layer(shape):
    shape = (17,) if shape == (1,) else shape
    dense, sparse, mask = pair(17, 7)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    y, y2 = dense(x), sparse(x2)
    torch.testing.assert_close(y2, y)
    g = torch.randn_like(y)
    y.backward(g)
    y2.backward(g)
    torch.testing.assert_close(x2.grad, x.grad)
    torch.testing.assert_close(sparse.bias.grad, dense.bias.grad)
    torch.testing.assert_close(sparse.to_dense(sparse.values.grad), dense.weight.grad * mask)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("inputs", "outputs", "batch"), [(1, 1, 1), (7, 1, 3), (17, 5, 1), (5, 17, 4), (6, 6, 0)])
def test_gradcheck(inputs, outputs, batch, relu):
    _, layer, _ = pair(inputs, outputs, relu=relu)
    x = torch.randn(batch, inputs, dtype=torch.float64, requires_grad=True)

    def run(x, values, bias):
        return torch.func.functional_call(layer, {"values": values, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.values, layer.bias))


def test_non_contiguous_input():
    dense, sparse, _ = pair(8, 5)
    for x in (torch.randn(8, 6).t(), torch.randn(12, 16)[::2, ::2], torch.randn(1, 8).expand(6, 8)):
        x = x.double() if x.stride(0) else torch.randn(1, 8, dtype=torch.float64).expand(6, 8)
        torch.testing.assert_close(sparse(x), dense(x))


def test_non_contiguous_output_gradient():
    dense, sparse, mask = pair(8, 5)
    x = torch.randn(6, 8, dtype=torch.float64)
    for g in (
        torch.ones(1, 1).double().expand(6, 5),
        torch.randn(12, 10).double()[::2, ::2],
        torch.randn(5, 6).double().t(),
    ):
        dense.zero_grad()
        sparse.zero_grad()
        dense(x).backward(g)
        sparse(x).backward(g)
        torch.testing.assert_close(sparse.to_dense(sparse.values.grad), dense.weight.grad * mask)
        torch.testing.assert_close(sparse.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("grad", [True, False])
def test_outputs_and_input_gradients_are_ordinary_tensors(grad):
    _, layer, _ = pair(8, 9)
    for shape in ((6, 8), (2, 3, 8), (1, 8)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        with torch.set_grad_enabled(grad):
            y = layer.train(grad)(x)
        assert y.is_contiguous()
        if grad:
            assert torch.autograd.grad(y.sum(), x)[0].is_contiguous()


def test_no_bias_and_frozen_parts():
    layer = SparseLinear.random(6, 4, 10, bias=False)
    assert layer.bias is None
    x = torch.randn(3, 6)
    layer(x).sum().backward()
    assert layer.values.grad.shape == (10,)
    layer.values.requires_grad_(False)
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dense_weight().sum(0).expand(3, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_types(dtype):
    dense, sparse, mask = pair(16, 8, dtype=dtype)
    x = torch.randn(5, 16).to(dtype)
    y = sparse(x)
    assert y.dtype is dtype
    torch.testing.assert_close(y, dense(x), rtol=2e-2, atol=2e-2)
    y.float().square().sum().backward()
    dense(x).float().square().sum().backward()
    assert sparse.values.grad.dtype is dtype
    torch.testing.assert_close(sparse.to_dense(sparse.values.grad), dense.weight.grad * mask, rtol=5e-2, atol=5e-2)
    with torch.no_grad():
        sparse.eval()
        first = sparse(x[:1])
        sparse.values.data.mul_(2)
        assert not torch.equal(sparse(x[:1]), first)


def test_autocast_returns_its_type():
    dense, sparse, _ = pair(16, 8, dtype=torch.float32)
    x = torch.randn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, wanted = sparse(x), dense(x)
    assert y.dtype is wanted.dtype is torch.bfloat16
    torch.testing.assert_close(y, wanted, rtol=2e-2, atol=2e-2)


def test_errors_name_the_problem():
    layer = SparseLinear.random(6, 4, 10)
    with pytest.raises(ValueError, match="is 5; this layer takes 6"):
        layer(torch.randn(2, 5))
    with pytest.raises(ValueError, match="float64"):
        layer(torch.randn(2, 6, dtype=torch.float64))
    for bad, words in (
        (torch.tensor([3, 24]), "reach from 3 to 24"),
        (torch.tensor([-1, 2]), "reach from -1"),
        (torch.tensor([3, 3]), "not strictly increasing"),
        (torch.tensor([3.0]), "int64"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            SparseLinear(6, 4, bad)
    with pytest.raises(ConfigurationError, match="shape"):
        SparseLinear(6, 4, torch.tensor([1, 2]), torch.ones(3))
    with pytest.raises(ConfigurationError, match="bool mask"):
        SparseLinear.from_linear(nn.Linear(6, 4), torch.ones(4, 6))
    with pytest.raises(ConfigurationError, match="cannot choose 25 of 24"):
        SparseLinear.random(6, 4, 25)


def test_conversions_round_trip():
    dense, sparse, mask = pair(9, 5)
    assert torch.equal(sparse.mask(), mask)
    assert torch.equal(sparse.dense_weight(), dense.weight)
    back = sparse.to_linear()
    assert torch.equal(back.weight, dense.weight)
    assert torch.equal(back.bias, dense.bias)
    grad = torch.randn(5, 9, dtype=torch.float64)
    assert torch.equal(sparse.to_dense(sparse.from_dense(grad)), grad * mask)


def test_evaluation_follows_the_weights():
    layer = SparseLinear.random(12, 10, 50, dtype=torch.float64).eval()
    for batch in (1, 3):
        x = torch.randn(batch, 12, dtype=torch.float64)
        with torch.no_grad():
            layer(x)
            layer(x)
            layer.values.mul_(2)
            torch.testing.assert_close(layer(x), layer.to_linear()(x))
            layer.bias.data = layer.bias.data + 1
            torch.testing.assert_close(layer(x), layer.to_linear()(x))
            layer.values.data.mul_(3)
            layer.refresh()
            torch.testing.assert_close(layer(x), layer.to_linear()(x))
            layer.values.data.mul_(3)
            layer.train().eval()
            torch.testing.assert_close(layer(x), layer.to_linear()(x))


def test_single_example_takes_every_layout_after_the_first():
    layer = SparseLinear.random(12, 10, 50, relu=True).eval()
    with torch.no_grad():
        x = torch.randn(1, 12)
        wanted = layer.to_linear()(x).relu()
        for _ in range(3):
            torch.testing.assert_close(layer(x), wanted)
        torch.testing.assert_close(layer(x[0]), wanted[0])
        torch.testing.assert_close(layer(x.repeat(2, 1)), wanted.repeat(2, 1))
        torch.testing.assert_close(layer(torch.stack([x, x], -1)[..., 0]), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 4])
def test_inference_mode_then_training(batch, dtype):
    layer = SparseLinear.random(12, 10, 50, dtype=dtype).eval()
    x = torch.randn(batch, 12).to(dtype)
    with torch.inference_mode():
        first = layer(x)
        assert torch.equal(layer(x), first)
    layer.train()
    y = layer(x)
    assert torch.equal(y, first)
    y.float().sum().backward()
    with torch.no_grad():
        layer.values -= layer.values.grad
    changed = layer(x)
    assert not torch.equal(changed, first)
    layer.eval()
    with torch.inference_mode():
        assert torch.equal(layer(x), changed.detach())


def test_training_sees_writes_through_data():
    layer = SparseLinear.random(12, 10, 50)
    x = torch.randn(3, 12)
    layer(x)
    layer.values.data.mul_(2)
    torch.testing.assert_close(layer(x), layer.to_linear()(x))


def test_row_major_follows_flat_indices():
    layer = SparseLinear(4, 3, torch.tensor([0, 1, 5, 6, 8, 11]), torch.tensor([1.0, -1.0, 0.5, 3.0, -2.0, 2.0]))
    assert layer.values.tolist() != [1.0, -1.0, 0.5, 3.0, -2.0, 2.0]
    assert layer.row_major(layer.values).tolist() == [1.0, -1.0, 0.5, 3.0, -2.0, 2.0]


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_growth_equals_the_dense_gradient(micro_batches):
    dense, sparse, mask = pair(70, 600, 0.1)
    sparse.collect_dense_gradient()
    for _ in range(micro_batches):
        x = torch.randn(5, 70, dtype=torch.float64)
        dense(x).square().sum().backward()
        sparse(x).square().sum().backward()
    torch.testing.assert_close(sparse.dense_gradient(), dense.weight.grad)
    score = dense.weight.grad.abs().masked_fill(mask, -1).reshape(-1)
    assert torch.equal(sparse.grow_candidates(321), score.topk(321).indices.sort().values)
    # Averaging over processes comes before the absolute value.
    flipped = sparse.grow_candidates(321, reduce=lambda tile: tile.mul_(-2))
    assert torch.equal(flipped, score.topk(321).indices.sort().values)


def test_growth_ties_at_zero_are_broken_by_the_key():
    layer = SparseLinear(3, 4, torch.tensor([1, 4]))
    layer.collect_dense_gradient()
    (layer(torch.zeros(2, 3)).sum() * 0).backward()
    choices = set()
    for key in range(20):
        free = torch.tensor([0, 2, 3, 5, 6, 7, 8, 9, 10, 11])
        wanted = free[tie_order(free, key).argsort()[:4]].sort().values.tolist()
        assert layer.grow_candidates(4, key=key).tolist() == wanted
        choices.add(tuple(wanted))
    assert len(choices) > 10
    assert layer.grow_candidates(11, exclude=torch.tensor([1])).tolist() == [0, *range(2, 12)]
    with pytest.raises(ConfigurationError, match="only 10 positions"):
        layer.grow_candidates(11)


def test_gradient_is_kept_only_when_asked():
    layer = SparseLinear.random(6, 4, 10)
    layer(torch.randn(2, 6)).sum().backward()
    with pytest.raises(ConfigurationError, match="no gradient was collected"):
        layer.grow_candidates(1)
    layer.collect_dense_gradient()
    layer(torch.randn(2, 6)).sum().backward()
    assert layer.grow_candidates(1).numel() == 1
    assert len(layer.collected) == 1
    layer.collect_dense_gradient(False)
    assert not layer.is_collecting
    assert layer.collected == ()


def test_a_discarded_gradient_is_not_collected():
    """Two uses in one backward pass count, two micro-batches count, what zero_grad threw away does not."""
    dense, sparse, _ = pair(7, 6)
    sparse.collect_dense_gradient()
    for keep in (False, True):
        dense.zero_grad()
        sparse.zero_grad()
        for _ in range(2):
            x, y = torch.randn(2, 3, 7, dtype=torch.float64)
            for layer in (dense, sparse):
                (layer(x) + layer(y)).square().sum().backward()
        assert keep or len(sparse.collected) == 4
    assert len(sparse.collected) == 4
    torch.testing.assert_close(sparse.dense_gradient(), dense.weight.grad)


def test_collected_gradient_at_connections_that_were_grown_since():
    dense, sparse, mask = pair(7, 6)
    sparse.collect_dense_gradient()
    x = torch.randn(3, 7, dtype=torch.float64)
    for layer in (dense, sparse):
        for micro_batch in (x, x + 1):
            layer(micro_batch).square().sum().backward()
    other = ~mask
    sparse.set_pattern(other.reshape(-1).nonzero().squeeze(1))
    torch.testing.assert_close(sparse.to_dense(sparse.collected_gradient()), dense.weight.grad * other)


def test_set_pattern_carries_values_and_state():
    _, sparse, _ = pair(9, 7)
    optimizer = torch.optim.AdamW(sparse.parameters())
    sparse(torch.randn(4, 9, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    weight, average = sparse.dense_weight(), sparse.to_dense(optimizer.state[sparse.values]["exp_avg"])
    parameter = sparse.values
    new_mask = torch.rand(7, 9) < 0.5
    source = sparse.set_pattern(new_mask.reshape(-1).nonzero().squeeze(1))
    assert sparse.values is parameter
    assert sparse.values.grad is None
    assert torch.equal(sparse.mask(), new_mask)
    assert torch.equal(sparse.dense_weight(), weight * new_mask)
    state = optimizer.state[sparse.values]
    state["exp_avg"], state["exp_avg_sq"] = remap(state["exp_avg"], source), remap(state["exp_avg_sq"], source)
    assert torch.equal(sparse.to_dense(state["exp_avg"]), average * new_mask)
    x = torch.randn(4, 9, dtype=torch.float64)
    torch.testing.assert_close(sparse(x), sparse.to_linear()(x))
    sparse(x).square().sum().backward()
    optimizer.step()


def test_rewiring_adds_and_removes():
    layer = SparseLinear(3, 2, torch.tensor([0, 2, 4]), torch.tensor([1.0, 2.0, 3.0]))
    assert layer.rewire(torch.tensor([1]), torch.tensor([4])).tolist() == [0, -1, 2]
    assert layer.dense_weight().tolist() == [[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]
    layer.rewire(torch.tensor([]).long(), torch.tensor([0, 1]))
    assert layer.dense_weight().tolist() == [[0.0, 0.0, 2.0], [0.0, 0.0, 0.0]]
    layer.set_pattern(torch.empty(0, dtype=torch.int64))
    assert layer.set_pattern(torch.tensor([3])).tolist() == [-1]
    assert layer.values.tolist() == [0.0]


def test_state_dict_round_trip_with_another_pattern():
    a, b = SparseLinear.random(9, 7, 20), SparseLinear.random(9, 7, 31)
    stream = io.BytesIO()
    torch.save(a.state_dict(), stream)
    stream.seek(0)
    b.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(a.dense_weight(), b.dense_weight())
    assert torch.equal(a.mask(), b.mask())
    x = torch.randn(3, 9)
    assert torch.equal(a(x), b(x))


def test_damaged_state_is_refused():
    layer = SparseLinear.random(9, 7, 20)
    for key, change, words in (
        ("row_indices", lambda t: t.flip(0), "not sorted"),
        ("row_indices", lambda t: t + 7, "go up to 13"),
        ("row_indices", lambda t: t[:-1], "damaged"),
        ("column_pointers", lambda t: t[:-1], "saved with 8 inputs"),
    ):
        state = layer.state_dict()
        state[key] = change(state[key])
        with pytest.raises(RuntimeError, match=words):
            SparseLinear.random(9, 7, 20).load_state_dict(state)
    state = layer.state_dict()
    del state["row_indices"]
    with pytest.raises(RuntimeError, match="row_indices"):
        layer.load_state_dict(state)


def test_copies_are_independent():
    layer = SparseLinear.random(9, 7, 20)
    x = torch.randn(3, 9)
    layer.collect_dense_gradient()
    layer(x).sum().backward()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        before = layer.dense_weight()
        with torch.no_grad():
            other.values.zero_()
        other.set_pattern(torch.tensor([0]))
        assert torch.equal(layer.dense_weight(), before)
        assert not other.is_collecting


def test_state_is_small(engine):
    layer = SparseLinear.random(300, 300, 9000)
    layer(torch.randn(2, 300)).sum().backward()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    momentum = optimizer.state[layer.values]["momentum_buffer"]
    held = [layer.values, layer.values.grad, momentum, layer._rows.values]
    held += [v for v in vars(layer.pattern).values() if isinstance(v, torch.Tensor)]
    total = sum(t.numel() * t.element_size() for t in held)
    assert total == layer.state_bytes() + 8 * layer.nnz
    limit = 24 if engine.name == "compiled" else 28
    assert total <= limit * layer.nnz + 4 * (300 + 300 + 2)


@pytest.mark.parametrize(("size", "count"), [(0, 0), (10, 0), (10, 10), (10, 5), (10, 6), (100_000, 30), (1000, 400)])
def test_random_indices_are_exact(size, count):
    drawn = random_indices(size, count, torch.Generator().manual_seed(1))
    assert drawn.numel() == count
    assert bool((drawn.diff() > 0).all())
    assert count == 0 or (int(drawn[0]) >= 0 and int(drawn[-1]) < size)
    assert torch.equal(drawn, random_indices(size, count, torch.Generator().manual_seed(1)))


def test_random_indices_are_uniform():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(12)
    for _ in range(4000):
        counts[random_indices(12, 4, generator)] += 1
    # Each is drawn with probability 1/3: six standard deviations of a binomial.
    assert (counts - 4000 / 3).abs().max() < 6 * (4000 * 2 / 9) ** 0.5


@pytest.mark.parametrize("bias", [True, False])
def test_feature_major_head(bias):
    dense = nn.Linear(9, 3, bias=bias, dtype=torch.float64)
    head = FeatureMajorLinear.from_linear(dense)
    assert head.weight is dense.weight
    x = torch.randn(9, 6, dtype=torch.float64).t()
    a, b = x.clone().requires_grad_(), x.detach().requires_grad_()
    wanted, got = dense(a), head(b)
    torch.testing.assert_close(got, wanted)
    g = torch.autograd.grad(wanted.square().sum(), [a, dense.weight])
    h = torch.autograd.grad(got.square().sum(), [b, dense.weight])
    torch.testing.assert_close(h, g)
    assert h[0].stride() == (1, 6)
    torch.testing.assert_close(head(torch.ones(2, 4, 9).double()), dense(torch.ones(2, 4, 9).double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 5, 33, 130])
def test_gelu_is_part_of_the_layer(batch, dtype):
    torch.manual_seed(0)
    layer = SparseLinear.random(37, 53, 400, dtype=dtype)
    x = (6 * torch.randn(batch, 37, dtype=dtype)).requires_grad_()
    y = layer(x, gelu=True)
    exact = x.detach().double().requires_grad_()
    weight = layer.dense_weight().double().requires_grad_()
    wanted = torch.nn.functional.gelu(exact @ weight.t() + layer.bias.detach().double())
    g = torch.randn_like(wanted)
    layer.collect_dense_gradient()
    layer(x, gelu=True).backward(g.to(dtype))
    wanted.backward(g)
    tolerance = {"rtol": 1e-5, "atol": 2e-5} if dtype is torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(y.double(), wanted, **tolerance)
    torch.testing.assert_close(x.grad.double(), exact.grad, **tolerance)
    torch.testing.assert_close(layer.values.grad.double(), layer.from_dense(weight.grad), **tolerance)
    torch.testing.assert_close(layer.dense_gradient().double(), weight.grad, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x, gelu=True).double(), wanted, **tolerance)


def test_gelu_has_the_accuracy_of_single_precision():
    layer = SparseLinear(1, 1, torch.zeros(1, dtype=torch.int64), torch.ones(1), bias=False)
    x = torch.linspace(-12, 12, 20_001).unsqueeze(1).requires_grad_()
    y = layer(x, gelu=True)
    y.sum().backward()
    exact = x.detach().double().requires_grad_()
    wanted = torch.nn.functional.gelu(exact)
    wanted.sum().backward()
    assert float((y.detach().double() - wanted.detach()).abs().max()) < 2e-6
    assert float((x.grad.double() - exact.grad).abs().max()) < 2e-6


def test_a_feed_forward_network_computes_gelu_in_its_sparse_layer():
    torch.manual_seed(0)
    dense = dst.nn.FeedForward(12, 40).double()
    sparse = dst.prepare(copy.deepcopy(dense), dst.methods.rigl(0.4, backend="csr"))
    assert isinstance(sparse.expand, SparseLinear)
    masked = dst.to_dense(copy.deepcopy(sparse))
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(sparse(x), masked(x))
