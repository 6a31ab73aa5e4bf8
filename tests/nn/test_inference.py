"""A chain of layers in one call against the same layers module by module."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional

from dst import kernels
from dst.errors import ConfigurationError
from dst.kernels import CompiledChain, TorchKernels
from dst.kernels.native import ISA
from dst.models import MLP
from dst.nn import FeatureMajorLinear, InferenceModel, SparseLinear, optimize_for_inference, sparse_linear
from tests.nn.conftest import use_engine

COMPILED = kernels.load()
needs_compiler = pytest.mark.skipif(COMPILED is None, reason="no compiler on this machine")


@pytest.fixture
def calls(monkeypatch):
    """The numbers of layers of the plans that ran and gave a result."""
    seen = []
    run = CompiledChain.run

    def recorded(self, x):
        y = run(self, x)
        if y is not None:
            seen.append(len(self._keep))
        return y

    monkeypatch.setattr(CompiledChain, "run", recorded)
    return seen


def network(dtype=torch.float32, bias=True):
    options = {"dtype": dtype, "bias": bias}
    return nn.Sequential(
        SparseLinear.random(17, 33, 150, relu=True, **options),
        nn.Sequential(SparseLinear.random(33, 65, 300, **options), nn.ReLU(), nn.Dropout(0.9)),
        nn.Linear(65, 21, bias=bias, dtype=dtype),
        nn.ReLU(inplace=True),
        FeatureMajorLinear(21, 7, bias=bias, dtype=dtype),
    ).eval()


def check(chain, model, x, **tolerance):
    with torch.no_grad():
        wanted = model(x)
        got = chain(x)
    torch.testing.assert_close(got, wanted, **tolerance)
    return got


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [0, 1, 7, 129, 300])
def test_equals_the_modules(calls, batch, dtype, bias, threads):
    model = network(dtype, bias)
    chain = optimize_for_inference(model)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for x in (
            torch.randn(batch, 17, dtype=dtype),
            torch.randn(17, batch, dtype=dtype).t(),
            torch.randn(2 * batch, 34, dtype=dtype)[::2, ::2],
            torch.randn(batch, 40, dtype=dtype)[:, 3:20],
            torch.randn(1, 17, dtype=dtype).expand(batch, 17),
            torch.randn(17, 2 * batch + 3, dtype=dtype)[:, 1 : batch + 1].t(),
        ):
            calls.clear()
            y = check(chain, model, x)
            assert calls[-1] == 4
            assert y.shape == (batch, 7)
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("isa", ISA)
def test_every_instruction_set(isa):
    before = COMPILED.isa
    try:
        COMPILED.isa = isa
        if COMPILED.isa != isa:
            pytest.skip(f"this machine has no {isa}")
        for dtype in (torch.float32, torch.float64):
            model = network(dtype)
            for batch in (1, 5, 64, 100):
                x = torch.randn(batch, 17, dtype=dtype)
                got = check(optimize_for_inference(model), model, x)
                dense = nn.Sequential(*[layer.to_linear() if isinstance(layer, SparseLinear) else layer
                                        for layer in (model[0], nn.ReLU(), *model[1], *model[2:])])  # fmt: skip
                torch.testing.assert_close(got, dense(x).detach())
    finally:
        COMPILED.isa = before


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 300_000), (200_000, 1)])
def test_large_activations_are_cut(shape):
    # A batch in several pieces, the last one a single example; and layers as wide as the scratch memory alone.
    batch, width = (32_769, 64) if shape[0] == 1 else (3, 200_000)
    model = nn.Sequential(
        SparseLinear.random(5, width, 3 * width, relu=True), SparseLinear.random(width, 3, 2 * width), nn.Linear(3, 2)
    ).eval()
    chain = optimize_for_inference(model)
    for x in (torch.randn(batch, 5), torch.randn(5, batch).t()):
        check(chain, model, x, rtol=1e-3, atol=1e-2)


@needs_compiler
def test_non_finite_inputs_stay_where_they_are():
    # Output 0 reads inputs 0 to 9, output 1 inputs 10 to 19, and so on in turns: the ends of rows meet the next row's.
    flat = torch.tensor(
        [row * 20 + column for row in range(5) for column in range(10 * (row % 2), 10 * (row % 2) + 10)]
    )
    chain = optimize_for_inference(SparseLinear(20, 5, flat, torch.ones(50), bias=False, relu=True).eval())
    for bad in (torch.nan, torch.inf):
        for column in (0, 9, 10, 19):
            x = torch.ones(1, 20)
            x[0, column] = bad
            with torch.no_grad():
                assert torch.isfinite(chain(x))[0].tolist() == [row % 2 != column // 10 for row in range(5)]


class Flattening(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.first, self.second, self.form = SparseLinear.random(12, 9, 50), nn.Linear(9, 4), form

    def forward(self, x):
        x = x.flatten(1) if self.form == "method" else torch.flatten(x, start_dim=1)
        x = self.first(x)
        return self.second(x.relu() if self.form == "method" else functional.relu(x))


@needs_compiler
def test_follows_forward_methods(calls):
    mlp = MLP((3, 2, 2), 5, width=8, depth=2)
    mlp.hidden[0] = SparseLinear.from_linear(mlp.hidden[0], torch.rand(8, 12) < 0.5)
    for model in (Flattening("method").eval(), Flattening("function").eval(), mlp.eval()):
        chain = optimize_for_inference(model)
        for shape in ((1, 3, 2, 2), (6, 3, 2, 2), (5, 12)):
            calls.clear()
            check(chain, model, torch.randn(shape))
            assert calls[-1] >= 2


@needs_compiler
def test_follows_the_weights(calls):
    model = network()
    chain = optimize_for_inference(model)
    x = torch.randn(3, 17)
    check(chain, model, x)

    def step():
        for p in model.parameters():
            with torch.no_grad():
                p.add_(torch.randn_like(p))

    def rewire():
        layer = model[0]
        layer.set_pattern(sparse_linear.random_indices(17 * 33, layer.nnz, None))
        with torch.no_grad():
            layer.values.normal_()

    def replace_storage():
        for p in model.parameters():
            p.data = torch.randn_like(p.data)
        for layer in (model[0], model[1][0]):
            layer.refresh()

    def replace_parameter():
        model[0].values = nn.Parameter(torch.randn_like(model[0].values))
        model[2].weight = nn.Parameter(torch.randn_like(model[2].weight))
        model[4].bias = None

    def load():
        model.load_state_dict(network().state_dict())

    def relu():
        model[1][0].relu = not model[1][0].relu
        model[0].relu = False

    def train_and_back():
        model.train()
        model[0].values.data.normal_()
        model.eval()

    for change in (step, rewire, replace_storage, relu, train_and_back, load, replace_parameter):
        with torch.no_grad():
            before = chain(x)
        change()
        calls.clear()
        after = check(chain, copy.deepcopy(model), x)
        assert not torch.allclose(before, after), change.__name__
        assert calls[-1] == 4, change.__name__


@needs_compiler
def test_the_modules_compute_where_one_call_would_differ(calls):
    model = network()
    chain = optimize_for_inference(model)
    x = torch.randn(3, 17)
    with torch.no_grad():
        chain(x)
        calls.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert chain(x).dtype is torch.bfloat16
        assert 4 not in calls
        model[1][2].train()
        assert not torch.equal(chain(x), chain(x))
        model.eval()
        seen = []
        handle = model[2].register_forward_hook(lambda *_: seen.append(1))
        chain.eval()
        chain(x)
        assert seen == [1]
        handle.remove()
        relu, model[3] = model[3], nn.Sigmoid()
        torch.testing.assert_close(chain.eval()(x), model(x))
        model[3] = relu
        assert 4 not in calls
        chain.eval()(x)
        assert 4 in calls
        calls.clear()
        chain.train()(x)
        assert 4 not in calls
        torch.testing.assert_close(chain.eval()(x.expand(2, 3, 17)), model(x.expand(2, 3, 17)))
        with pytest.raises(ValueError, match="this layer takes 17"):
            chain(torch.randn(3, 16))
        with pytest.raises(ValueError, match="float64"):
            chain(x.double())
    calls.clear()
    chain(x).sum().backward()
    assert not calls
    assert model[0].values.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_types(dtype):
    model = network(dtype)
    x = torch.randn(5, 17, dtype=dtype)
    check(optimize_for_inference(model), model, x, rtol=0, atol=0)


def test_without_compiled_kernels(monkeypatch):
    use_engine(monkeypatch, TorchKernels())
    model = network()
    check(optimize_for_inference(model), model, torch.randn(5, 17), rtol=0, atol=0)


@needs_compiler
def test_inference_mode_and_weights_made_inside_it():
    model = network()
    chain = optimize_for_inference(model)
    x = torch.randn(1, 17)
    with torch.inference_mode():
        torch.testing.assert_close(chain(x), model(x))
        made = network()
        other = optimize_for_inference(made)
        for _ in range(2):
            made[0].values.normal_()
            torch.testing.assert_close(other(x), made(x))
    model.train()(torch.randn(4, 17)).sum().backward()


@needs_compiler
def test_copies_follow_their_own_weights(calls):
    chain = optimize_for_inference(network())
    x = torch.randn(2, 17)
    with torch.no_grad():
        y = chain(x)
        for other in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
            calls.clear()
            torch.testing.assert_close(other(x), y)
            other.model[0].values.zero_()
            assert not torch.allclose(other(x), y)
            assert calls == [4, 4]
            torch.testing.assert_close(chain(x), y)
    stream = io.BytesIO()
    torch.save(chain.state_dict(), stream)
    stream.seek(0)
    chain.load_state_dict(torch.load(stream))


@needs_compiler
def test_threads_may_share_a_chain():
    chain = optimize_for_inference(network())
    inputs = [torch.randn(b, 17) for b in (1, 7, 129, 64)]
    with torch.no_grad():
        wanted = [chain.model(x) for x in inputs]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(50):
                if not torch.allclose(chain(inputs[i]), wanted[i], rtol=1e-4, atol=1e-5):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = SparseLinear.random(4, 4, 8)

    def forward(self, x):
        return x + self.layer(x)


class Branching(Residual):
    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(3, 3)), "no sparse layer"),
        (nn.Sequential(nn.Linear(3, 3), nn.Sigmoid()), "no sparse layer"),
        (nn.Sequential(SparseLinear.random(4, 5, 8), SparseLinear.random(4, 4, 8)), "5 outputs precedes one with 4"),
    ],
)
def test_refuses_what_it_cannot_optimize(model, message):
    with pytest.raises(ConfigurationError, match=message):
        optimize_for_inference(model.eval())


@pytest.mark.filterwarnings("ignore:nothing is fused")
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(SparseLinear.random(4, 4, 8), nn.Sigmoid()), (3, 4)),
        (nn.Sequential(nn.ReLU(), SparseLinear.random(4, 4, 8)), (3, 4)),
        (nn.Sequential(nn.Flatten(0), SparseLinear.random(4, 4, 8)), (2, 2)),
        (Residual(), (3, 4)),
        (Branching(), (3, 4)),
    ],
)
def test_what_is_no_chain_becomes_a_snapshot(model, shape):
    fast = optimize_for_inference(model.eval())
    assert isinstance(fast, InferenceModel)
    check(fast, model, torch.randn(shape))


def test_refuses_training_mode():
    with pytest.raises(ConfigurationError, match=r"model\.eval\(\)"):
        optimize_for_inference(network().train())
