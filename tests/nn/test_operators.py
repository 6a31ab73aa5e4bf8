"""Sparse layers as operators: compilers, exporters, profilers and FLOP counters see them."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dst
from dst.nn import SparseConv2d, SparseLinear
from dst.nn.operators import indices_of
from tests.sampling import rotated

GEOMETRY = (3, 2), (2, 1), (1, 0), (1, 2)


@pytest.fixture
def compiled():
    """Compile with everything but a code generator; the counters start at zero."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda model, **options: torch.compile(model, backend="aot_eager", **options)
    torch._dynamo.reset()


def layers(dtype=torch.float64) -> tuple[SparseLinear, SparseConv2d]:
    height, width = GEOMETRY[0]
    size = 4 * 3 * height * width
    return SparseLinear.random(13, 7, 30, dtype=dtype), SparseConv2d(
        3, 4, torch.arange(0, size, 3), dtype=dtype,
        **dict(zip(("kernel_size", "stride", "padding", "dilation"), GEOMETRY, strict=True)),
    )  # fmt: skip


def operands(kind: str, dtype: torch.dtype, batch: int) -> tuple[SparseLinear, Tensor, list[Tensor], tuple]:
    linear, conv = layers(dtype)
    layer = linear if kind == "linear" else conv
    x = torch.randn((batch, 13) if kind == "linear" else (batch, 3, 6, 5), dtype=dtype)
    return layer, x, indices_of(layer.pattern), () if kind == "linear" else GEOMETRY


@pytest.mark.parametrize(
    ("kind", "dtype", "batch"), rotated(["linear", "conv"], [torch.float32, torch.float64], [0, 1, 5], each=3)
)
def test_operators_keep_their_contracts(engine, kind, dtype, batch):
    layer, x, pattern, geometry = operands(kind, dtype, batch)
    forward = torch.ops.dst.sparse_linear if kind == "linear" else torch.ops.dst.sparse_conv2d
    backward = torch.ops.dst.sparse_linear_backward if kind == "linear" else torch.ops.dst.sparse_conv2d_backward
    values = layer.values.detach()
    for bias, relu in ((None, False), (layer.bias.detach(), True)):
        for training in (False, True):
            tensors = (x.clone().requires_grad_(training), values.clone().requires_grad_(training))
            shift = None if bias is None else bias.clone().requires_grad_(training)
            torch.library.opcheck(forward.default, (*tensors, None, shift, pattern, *geometry, relu))
        y = forward(x, values, layer.row_major(values), bias, pattern, *geometry, relu)
        assert torch.equal(y, forward(x, values, None, bias, pattern, *geometry, relu))
        g = torch.randn_like(y)
        for wants in ((False, False), (True, bias is not None)):
            call = (g, x, values, y if relu else None, pattern, *geometry, *wants)
            torch.library.opcheck(backward.default, call, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("batch", "dtype"), rotated([0, 1, 5], [torch.float32, torch.float64]))
def test_gelu_keeps_the_contract(engine, dtype, batch):
    layer, x, pattern, _ = operands("linear", dtype, batch)
    values, forward = layer.values.detach(), torch.ops.dst.sparse_linear_gelu
    for bias in (None, layer.bias.detach()):
        torch.library.opcheck(forward.default, (x, values, None, bias, pattern, False))
        tensors = [None if t is None else t.clone().requires_grad_() for t in (x, values, bias)]
        torch.library.opcheck(forward.default, (*tensors[:2], None, tensors[2], pattern, True))
        y, slope = forward(x, values, None, bias, pattern, True)
        backward = torch.ops.dst.sparse_linear_backward.default
        for wants in ((False, False), (True, bias is not None)):
            call = (torch.randn_like(y), x, values, None, pattern, *wants, slope)
            torch.library.opcheck(backward, call, test_utils=("test_schema", "test_faketensor"))


class Watching(TorchDispatchMode):
    """Sees every operator, and changes none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("kind", ["linear", "gelu", "conv"])
def test_layers_are_differentiated_once(kind, watched):
    layer, x, _, _ = operands("conv" if kind == "conv" else "linear", torch.float64, 5)
    x.requires_grad_()
    with Watching() if watched else torch.enable_grad():
        y = layer(x, gelu=True) if kind == "gelu" else layer(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


class Net(nn.Module):
    def __init__(self, dtype=torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = SparseConv2d(2, 4, torch.arange(0, 72, 3), kernel_size=(3, 3), padding=(1, 1), dtype=dtype)
        self.norm = nn.BatchNorm2d(4, dtype=dtype)
        self.hidden = SparseLinear.random(80, 12, 200, dtype=dtype, relu=True)
        self.smooth = SparseLinear.random(12, 12, 40, dtype=dtype)
        self.head = nn.Linear(12, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(self.norm(self.conv(x)).relu().flatten(1))
        return self.head(self.smooth(x, gelu=True))


def passes(model: nn.Module, parameters: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    parameters.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in parameters.parameters())]


def assert_equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def rewire(layer: SparseLinear) -> None:
    """Replace five connections."""
    flat = layer.pattern.flat()
    free = ~torch.isin(torch.arange(layer.shape[0] * layer.in_features), flat)
    layer.rewire(free.nonzero().squeeze(1)[:5], flat[:5])


def test_compiled_equals_eager_across_topology_updates(compiled):
    net = Net()
    twin = copy.deepcopy(net)
    fast = compiled(net, fullgraph=True)
    for update in range(3):
        x = torch.randn(6, 2, 4, 5, dtype=torch.float64)
        assert_equal(passes(fast, net, x), passes(twin, twin, x))
        for model in (net, twin):
            rewire(model.conv)
            rewire(model.hidden)
        with torch.no_grad():
            assert_equal([net.hidden.dense_weight()], [twin.hidden.dense_weight()])
        assert counters["stats"]["unique_graphs"] == 1, update
    assert not counters["graph_break"]
    # Evaluation is another graph; a single example too is computed by it.
    net.eval()
    twin.eval()
    for batch in (6, 1):
        x = torch.randn(batch, 2, 4, 5, dtype=torch.float64)
        with torch.no_grad():
            assert_equal([fast(x)], [twin(x)])


# The compiler hides this warning of its own from users, but not from a filter that makes errors of warnings.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_training_equals_eager(compiled):
    """RigL's steps that collect the dense gradient leave the graph, the others stay in one."""
    results = []
    for backend in ("eager", "aot_eager"):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(80, 12), nn.ReLU(), nn.Linear(12, 3)
        ).double()
        method = dst.methods.rigl(0.3, update_every=3, backend="csr")
        net = dst.prepare(net, method)
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        sparsifier = dst.Sparsifier(net, optimizer, method, total_steps=16)
        model = net if backend == "eager" else compiled(net)
        graphs = []
        for step in range(16):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(6, 2, 4, 5, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            sparsifier.before_step()
            optimizer.step()
            graphs.append(counters["stats"]["unique_graphs"])
        assert sparsifier.updates == 4
        results.append([*(m.double() for m in sparsifier.masks.values()), *(p.detach() for p in net.parameters())])
    assert_equal(*results)
    assert graphs[8:] == graphs[7:-1], graphs  # no compilation after the second update


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # Two small kernels are not worth precompiled headers, nor processes that compile in parallel.
    monkeypatch.setattr(inductor, "cpp_cache_precompile_headers", False)
    monkeypatch.setattr(inductor, "compile_threads", 1)
    torch._dynamo.reset()
    net = nn.Sequential(Net().conv, nn.ReLU(), nn.Flatten(), Net().hidden)
    x = torch.randn(6, 2, 4, 5, dtype=torch.float64)
    wanted = passes(net, net, x)
    assert_equal(passes(torch.compile(net, fullgraph=True), net, x), wanted)
    torch._dynamo.reset()


@pytest.mark.parametrize("batch", [1, 6])
def test_export(batch):
    net = Net().eval()
    x = torch.randn(batch, 2, 4, 5, dtype=torch.float64)
    program = torch.export.export(net, (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    names = ["sparse_conv2d", "sparse_linear", "sparse_linear_gelu"]
    assert [t for t in targets if t.startswith("dst.")] == [f"dst.{name}.default" for name in names]
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), net(x))


def test_fake_tensors():
    """Tools that trace shapes run the layers without their values, a single example in evaluation too."""
    net = Net().eval()
    with torch.no_grad():
        net(torch.zeros(1, 2, 4, 5, dtype=torch.float64))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            for batch in (1, 6):
                fake = mode.from_tensor(torch.zeros(batch, 2, 4, 5, dtype=torch.float64))
                assert net(fake).shape == (batch, 3)
                assert net.hidden(mode.from_tensor(torch.zeros(batch, 80, dtype=torch.float64))).shape == (batch, 12)


def test_the_profiler_names_them():
    net = Net()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        net(torch.randn(6, 2, 4, 5, dtype=torch.float64)).sum().backward()
    names = {event.key: event.count for event in profile.key_averages()}
    for name in ("sparse_linear", "sparse_linear_gelu", "sparse_conv2d", "sparse_conv2d_backward"):
        assert names[f"dst::{name}"] == 1
    assert names["dst::sparse_linear_backward"] == 2


@pytest.mark.parametrize("batch", [1, 6])
def test_flops_are_those_of_the_non_zeros(batch):
    linear, conv = layers()
    x, image = torch.randn(batch, 13, dtype=torch.float64), torch.randn(batch, 3, 6, 5, dtype=torch.float64)
    positions = 3 * 3  # (6 + 2 - 3) // 2 + 1 down, 5 - 3 + 1 across
    for layer, given, once in ((linear, x, 2 * linear.nnz * batch), (conv, image, 2 * conv.nnz * positions * batch)):
        for input in (False, True):
            with FlopCounterMode(display=False) as counter:
                y = layer(given.clone().requires_grad_(input))
            assert counter.get_total_flops() == once
            with FlopCounterMode(display=False) as counter:
                y.sum().backward()
            assert counter.get_total_flops() == once * (1 + input)
        layer.eval()
        with torch.no_grad():
            layer(given)  # prepares the call that bypasses the operator
            with FlopCounterMode(display=False) as counter:
                layer(given)
        assert counter.get_total_flops() == once
