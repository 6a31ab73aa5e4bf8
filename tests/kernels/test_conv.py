"""Sparse convolution, compiled and of the fallback, against torch's dense one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from dst import kernels
from dst.kernels.geometry import ConvShape
from dst.kernels.native import ISA

COMPILED = kernels.load()
# Batch, input channels, height, width, output channels, density.
IMAGES = [
    (0, 3, 5, 6, 4, 0.3),
    (1, 3, 17, 9, 5, 0.3),
    (3, 5, 8, 8, 7, 0.4),
    (9, 4, 13, 31, 6, 0.2),
    (19, 2, 7, 1, 3, 0.5),
]
KERNELS = [(1, 1), (3, 3), (5, 3), (7, 7)]


@pytest.fixture
def compiled():
    if COMPILED is None:
        pytest.skip("no compiler on this machine")
    before = COMPILED.isa
    yield COMPILED
    COMPILED.isa = before


@pytest.fixture(params=["compiled", "torch"])
def engine(request):
    """Both engines: they have one interface."""
    return kernels.TorchKernels() if request.param == "torch" else request.getfixturevalue("compiled")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make(engine, outputs, channels, kernel, density, dtype=torch.float64):
    weight = torch.randn(outputs, channels, *kernel, dtype=dtype)
    weight *= torch.rand(weight.shape) < density
    weight[0] = 0  # an output without weights
    flat = weight.reshape(-1).nonzero().squeeze(1)
    pattern = engine.pattern(flat, outputs, channels * kernel[0] * kernel[1])
    values = weight.reshape(-1)[pattern.flat_by_position()]
    row_values = torch.empty_like(values)
    engine.refresh(pattern, values, row_values)
    return weight, pattern, values, row_values


def sparse(engine, made, shape, x, g, bias, relu=False):
    _, pattern, values, row_values = made
    y = engine.conv_forward(pattern, shape, row_values, x, bias, relu)
    return y, *engine.conv_backward(pattern, shape, values, x, g, input=True, bias=True)


def dense(made, x, g, bias, stride, padding, dilation):
    weight, pattern, _, _ = made
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = functional.conv2d(*leaves, stride, padding, dilation)
    gx, gw, gb = torch.autograd.grad(y, leaves, g)
    return y.detach(), gx, gw.reshape(-1)[pattern.flat_by_position()], gb


def case(engine, images, kernel, stride=(1, 1), padding=(0, 0), dilation=(1, 1), dtype=torch.float64):
    *sizes, outputs, density = images
    try:
        shape = ConvShape(sizes, outputs, kernel, stride, padding, dilation)
    except ValueError:
        return None
    made = make(engine, outputs, sizes[1], kernel, density, dtype)
    x, g, bias = (torch.randn(s, dtype=dtype) for s in (sizes, shape.output, outputs))
    return shape, made, x, g, bias


def close(got, wanted, tolerance):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dilation", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1), (2, 3)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_matches_dense(engine, kernel, stride, dilation):
    compared = 0
    for images in IMAGES:
        for padding in ((0, 0), (1, 1), (2, 0), (3, 3)):
            made = case(engine, images, kernel, stride, padding, dilation)
            if made is None:
                continue
            shape, weights, x, g, bias = made
            got = sparse(engine, weights, shape, x, g, bias)
            close(got, dense(weights, x, g, bias, stride, padding, dilation), 1e-10)
            compared += 1
    assert compared


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("isa", ISA)
def test_every_instruction_set(compiled, isa, dtype):
    compiled.isa = isa
    if compiled.isa != isa:
        pytest.skip(f"this machine has no {isa}")
    # The last two have many channels, which are read block by block; some blocks of the last have no taps.
    for images in (*IMAGES, (33, 20, 6, 19, 24, 0.3), (5, 150, 6, 7, 130, 0.1), (1, 150, 9, 5, 70, 0.002)):
        for kernel, stride, padding in (((3, 3), (1, 1), (1, 1)), ((5, 3), (2, 1), (2, 2)), ((1, 1), (2, 2), (0, 0))):
            made = case(compiled, images, kernel, stride, padding, dtype=dtype)
            if made is None:
                continue
            shape, weights, x, g, bias = made
            got = sparse(compiled, weights, shape, x, g, bias)
            wanted = dense(weights, x, g, bias, stride, padding, (1, 1))
            close(got, wanted, 1e-3 if dtype is torch.float32 else 1e-10)


@pytest.mark.parametrize("isa", ISA)
@pytest.mark.parametrize("images", [(3, 5, 20, 9, 7, 0.4), (64, 40, 8, 8, 36, 0.1), (20, 3, 33, 33, 4, 0.5)])
def test_same_bits_for_every_number_of_threads(compiled, threads, isa, images):
    compiled.isa = isa
    shape, weights, x, g, bias = case(compiled, images, (3, 3), (1, 1), (1, 1), dtype=torch.float32)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(sparse(compiled, weights, shape, x, g, bias))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_relu_keeps_nan(engine):
    shape, weights, x, g, bias = case(engine, (3, 5, 8, 8, 7, 0.4), (3, 3), padding=(1, 1))
    bias[1] = float("nan")
    y = sparse(engine, weights, shape, x, g, bias)[0]
    torch.testing.assert_close(sparse(engine, weights, shape, x, g, bias, relu=True)[0], y.relu(), equal_nan=True)
    assert y[:, 1].isnan().all()
    assert not y[:, 0].isnan().any()


def test_infinite_values_stay_where_they_belong(engine):
    shape, weights, x, _, _ = case(engine, (9, 4, 9, 9, 6, 0.3), (3, 3), padding=(1, 1))
    x[4, 2, 3, 3] = float("inf")
    y = engine.conv_forward(weights[1], shape, weights[3], x, None)
    wanted = functional.conv2d(x.masked_fill(x.isinf(), 0), weights[0], padding=1)
    hit = torch.zeros(9, 9, dtype=torch.bool)
    hit[2:5, 2:5] = True
    torch.testing.assert_close(y[:4], wanted[:4])
    torch.testing.assert_close(y[5:], wanted[5:])
    torch.testing.assert_close(y[4][:, ~hit], wanted[4][:, ~hit])


def test_nothing_optional(engine):
    shape, weights, x, g, bias = case(engine, (9, 4, 13, 31, 6, 0.2), (3, 3), (2, 2), (1, 1))
    wanted = dense(weights, x, g, torch.zeros_like(bias), (2, 2), (1, 1), (1, 1))
    y = engine.conv_forward(weights[1], shape, weights[3], x, None)
    gx, gv, gb = engine.conv_backward(weights[1], shape, weights[2], x, g, input=False, bias=False)
    assert gx is None
    assert gb is None
    close((y, gv), (wanted[0], wanted[2]), 1e-10)


@pytest.mark.parametrize("batch", [0, 3])
def test_without_weights(engine, batch):
    shape = ConvShape((batch, 3, 5, 6), 4, (3, 3), padding=(1, 1))
    made = make(engine, 4, 3, (3, 3), 0.0)
    x, g = torch.randn(batch, 3, 5, 6, dtype=torch.float64), torch.randn(batch, 4, 5, 6, dtype=torch.float64)
    y, gx, gv, gb = sparse(engine, made, shape, x, g, torch.ones(4, dtype=torch.float64))
    assert (y == 1).all()
    assert (gx == 0).all()
    assert gv.numel() == 0
    torch.testing.assert_close(gb, g.sum((0, 2, 3)))


def test_many_columns_take_wide_indices(compiled):
    images = (2, 8000, 4, 4, 3, 0.001)
    shape, weights, x, g, bias = case(compiled, images, (3, 3), padding=(1, 1))
    assert weights[1].wide
    close(sparse(compiled, weights, shape, x, g, bias), dense(weights, x, g, bias, 1, 1, 1), 1e-10)


def test_a_kernel_must_fit():
    with pytest.raises(ValueError, match="does not fit"):
        ConvShape((1, 3, 4, 9), 2, (5, 5), dilation=(1, 2))
