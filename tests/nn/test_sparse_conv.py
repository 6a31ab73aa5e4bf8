"""Convolutions that store only their non-zeros."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import dst
from dst import methods
from dst.kernels import TorchKernels
from dst.nn import SparseConv2d, SparseLinear
from tests.backends.runs import CLAIMED, OPTIMIZERS, Bottleneck, Run, assert_same
from tests.sampling import rotated

pytestmark = pytest.mark.usefixtures("engine")


def pair(
    inputs: int, outputs: int, density: float, kernel=1, dtype=torch.float64, **options
) -> tuple[nn.Conv2d, SparseConv2d]:
    """A masked convolution and the same with non-zeros alone."""
    torch.manual_seed(0)
    conv = nn.Conv2d(inputs, outputs, kernel, dtype=dtype, **options)
    mask = torch.rand(conv.weight.shape) < density
    mask[0], mask[:, -1] = False, False  # an empty row and an empty column
    conv.weight.data.mul_(mask)
    positions = mask.reshape(-1).nonzero().squeeze(1)
    geometry = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    sparse = SparseConv2d(inputs, outputs, positions, conv.weight.detach().reshape(-1)[positions], **geometry)
    sparse.bias.data.copy_(conv.bias.detach())
    return conv, sparse


@pytest.mark.parametrize("layout", ["plain", "channels_last", "crossed", "single"])
@pytest.mark.parametrize("stride", [1, (2, 3)])
@pytest.mark.parametrize("shape", [(3, 17, 5, 7), (1, 7, 1, 1), (0, 5, 4, 4), (2, 129, 3, 4)])
def test_it_is_the_masked_convolution(shape, stride, layout):
    conv, sparse = pair(shape[1], 6, 0.4, stride=stride)
    x = torch.randn(shape, dtype=torch.float64)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "crossed":
        x = torch.randn(shape[0], shape[1], shape[3], shape[2], dtype=torch.float64).transpose(2, 3)
    elif layout == "single":
        x = torch.randn(shape[1:], dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = conv(a), sparse(b)
    assert z.is_contiguous()
    torch.testing.assert_close(z, y)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    z.backward(gradient)
    torch.testing.assert_close(b.grad, a.grad)
    torch.testing.assert_close(sparse.bias.grad, conv.bias.grad)
    mask = sparse.mask()
    assert mask.shape == conv.weight.shape
    torch.testing.assert_close(sparse.to_dense(sparse.values.grad), conv.weight.grad * mask)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (3, {"padding": 1}),
        (3, {"padding": 1, "stride": 2}),
        ((5, 3), {"padding": (2, 0), "dilation": (1, 2)}),
        ((2, 4), {"stride": (2, 3), "padding": (0, 2)}),
        (7, {"padding": 3, "stride": 2}),
    ],
)
def test_any_kernel_is_the_masked_convolution(kernel, options, relu):
    conv, sparse = pair(5, 6, 0.3, kernel, **options)
    sparse.relu = relu
    x = torch.randn(3, 5, 11, 9, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = conv(a).relu() if relu else conv(a), sparse(b)
    torch.testing.assert_close(z, y)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    sparse.collect_dense_gradient()
    z.backward(gradient)
    torch.testing.assert_close(b.grad, a.grad)
    torch.testing.assert_close(sparse.bias.grad, conv.bias.grad)
    torch.testing.assert_close(sparse.to_dense(sparse.values.grad), conv.weight.grad * sparse.mask())
    torch.testing.assert_close(sparse.dense_gradient().view(conv.weight.shape), conv.weight.grad)
    torch.testing.assert_close(sparse.collected_gradient(), sparse.values.grad)
    dense = sparse.to_conv()
    torch.testing.assert_close(dense(x).relu() if relu else dense(x), y)


def test_gradcheck():
    _, sparse = pair(5, 4, 0.5, stride=2)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)

    def apply(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(sparse, {"values": values, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(apply, (x, sparse.values.detach().requires_grad_(), sparse.bias))


def test_wrong_inputs_are_named():
    _, sparse = pair(5, 4, 0.5)
    for shape in ((2, 4, 3, 3), (5, 3), (1, 2, 5, 3, 3)):
        with pytest.raises(ValueError, match=r"takes \(N, 5, H, W\)"):
            sparse(torch.zeros(shape, dtype=torch.float64))


def test_it_becomes_a_convolution_and_travels():
    conv, sparse = pair(5, 4, 0.5, stride=(2, 1))
    dense = sparse.to_conv()
    x = torch.randn(2, 5, 6, 6, dtype=torch.float64)
    assert torch.equal(dense(x), conv(x))
    assert dense.stride == (2, 1)
    assert torch.equal(copy.deepcopy(sparse)(x), sparse(x))
    other = SparseConv2d(5, 4, torch.arange(3), stride=(2, 1), dtype=torch.float64)
    other.load_state_dict(sparse.state_dict())
    assert torch.equal(other(x), sparse(x))
    assert "stride=(2, 1)" in repr(sparse)


@pytest.mark.parametrize(("name", "optimizer"), rotated(["rigl", "rigl_with_step", "rigl_rescaled", "set"], OPTIMIZERS))
def test_training_is_that_of_the_masked_backend(name, optimizer):
    masked, csr = (Run(CLAIMED[name](backend), optimizer, net=Bottleneck) for backend in ("masked", "csr"))
    found = {n for n, m in csr.model.named_modules() if isinstance(m, SparseConv2d)}
    assert {"conv", "expand", "shortcut"} <= found <= {"reduce", "conv", "expand", "shortcut", "padded"}
    masked.train(24)
    csr.train(24)
    assert csr.sparsifier.updates == 12
    assert_same(masked, csr)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_steps_have_the_same_bits_for_every_number_of_threads(engine, threads, dtype):
    if isinstance(engine, TorchKernels):
        pytest.skip("torch's own operations promise no bits")
    results = []
    for count in (1, 2):
        threads(count)
        generator = torch.Generator().manual_seed(0)
        net = nn.Sequential(
            SparseConv2d(
                3, 40, torch.arange(0, 40 * 27, 5), kernel_size=(3, 3), padding=(1, 1), relu=True, dtype=dtype,
                generator=generator,
            ),
            SparseConv2d(40, 24, torch.arange(0, 960, 4), stride=(2, 2), dtype=dtype, generator=generator),
            nn.ReLU(),
            nn.Flatten(),
            SparseLinear.random(24 * 81, 300, 20_000, generator, relu=True, dtype=dtype),
            SparseLinear.random(300, 100, 3_000, generator, dtype=dtype),
        )  # fmt: skip
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
        for batch in (70, 1, 33):
            x, gradient = (
                torch.randn(batch, *size, generator=generator, dtype=dtype) for size in ((3, 17, 18), (100,))
            )
            optimizer.zero_grad()
            y = net(x)
            y.backward(gradient)
            optimizer.step()
        results.append([y.detach(), *(p.detach() for p in net.parameters()), *(p.grad for p in net.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_the_plan_and_selectors_know_convolutions():
    method = methods.rigl(0.2, allocation=dst.allocation.Uniform(), backend="csr")
    rows = {row.name: (row.storage, row.note) for row in dst.plan(Bottleneck(), method).rows}
    assert {n for n, (storage, _) in rows.items() if storage == "csr"} == {
        "reduce.weight",
        "conv.weight",
        "expand.weight",
        "shortcut.weight",
        "padded.weight",
        "head.weight",
    }
    assert rows["grouped.weight"][1] == "a grouped convolution has no csr kernel"
    model = dst.prepare(Bottleneck(), method, include=[nn.Conv2d])
    assert isinstance(model.expand, SparseConv2d)
    assert not isinstance(model.head, dst.nn.SparseLinear)
    layers, _ = dst.topology.layers.find_layers(model, include=[nn.Conv2d])
    assert {layer.label for layer in layers} == {n for n in rows if not n.startswith(("head", "norm"))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (1, {}),
        (1, {"stride": 2}),
        (3, {"padding": 1}),
        (3, {"padding": 1, "stride": 2}),
        ((5, 3), {"padding": (2, 0), "dilation": (1, 2)}),
        ((2, 4), {"stride": (2, 3), "padding": (0, 2)}),
        ((3, 2), {"stride": (2, 1), "dilation": (3, 1), "padding": (3, 0)}),
        ((11, 9), {}),
    ],
)
def test_a_single_image_is_evaluated_as_many(kernel, options, bias, dtype):
    conv, sparse = pair(5, 6, 0.3, kernel, dtype, **options)
    if not bias:
        conv.bias = sparse.bias = None
    conv.eval(), sparse.eval()
    sparse.relu = True
    with torch.no_grad():
        for size in ((11, 9), (12, 16), (11, 9)):
            x = torch.randn(1, 5, *size, dtype=dtype)
            many = sparse(torch.cat([x, x, x, x]))
            for one in (
                x,
                x.to(memory_format=torch.channels_last),
                x[0],
                x.transpose(2, 3).contiguous().transpose(2, 3),
            ):
                y = sparse(one)
                assert y.is_contiguous()
                torch.testing.assert_close(y, conv(one).relu())
            torch.testing.assert_close(many[1:2], sparse(x))
    assert (sparse._prepared is None) == isinstance(sparse._engine, TorchKernels)


def test_a_single_image_sees_changed_weights():
    conv, sparse = pair(5, 6, 0.3, 3, padding=1)
    conv.eval(), sparse.eval()
    x = torch.randn(1, 5, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), conv(x))
        for tensor in (conv.weight, sparse.values, conv.bias, sparse.bias):
            tensor.mul_(2)
        torch.testing.assert_close(sparse(x), conv(x))
        sparse.relu = True
        torch.testing.assert_close(sparse(x), conv(x).relu())
        sparse.set_pattern(torch.arange(0, 6 * 45, 3))
        torch.testing.assert_close(sparse(x), sparse.to_conv()(x).relu())
        with pytest.raises(ValueError, match="does not fit"):
            sparse(torch.zeros(1, 5, 0, 3, dtype=torch.float64))
