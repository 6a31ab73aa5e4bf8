"""The compiled kernels over row-major examples against dense arithmetic in float64."""

from __future__ import annotations

import pytest
import torch

from dst import kernels
from dst.kernels.native import ISA

COMPILED = kernels.load()
BATCHES = [0, 1, 7, 64, 65, 1000]
SIZES = [(1, 1), (37, 53), (129, 7), (16, 160), (300, 17)]


@pytest.fixture(params=ISA)
def compiled(request):
    if COMPILED is None:
        pytest.skip("no compiler on this machine")
    before = COMPILED.isa
    COMPILED.isa = request.param
    if COMPILED.isa != request.param:
        COMPILED.isa = before
        pytest.skip(f"this machine has no {request.param}")
    yield COMPILED
    COMPILED.isa = before


def make(rows, columns, density, dtype, wide=False):
    weight = torch.randn(rows, columns, dtype=dtype) * (torch.rand(rows, columns) < density)
    weight[rows // 2] = 0  # an empty row and an empty column
    weight[:, columns // 2] = 0
    pattern = COMPILED.pattern(weight.reshape(-1).nonzero().squeeze(1), rows, columns)
    if wide:
        indices = {name: getattr(pattern, name).to(torch.int32) for name in ("row_indices", "column_indices")}
        pattern = kernels.Pattern(
            rows, columns, pattern.column_pointers, indices["row_indices"], pattern.row_pointers,
            indices["column_indices"], pattern.permutation,
        )  # fmt: skip
    return weight, pattern, weight.reshape(-1)[pattern.flat_by_position()]


def results(pattern, values, x, g, bias, relu, *, input=True):
    row_values = torch.empty_like(values)
    COMPILED.refresh(pattern, values, row_values)
    y = COMPILED.rows_forward(pattern, row_values, x, bias, relu)
    return y, *COMPILED.rows_backward(
        pattern, values, x, g, y if relu else None, input=input, bias=bias is not None
    )  # fmt: skip


def check(got, weight, pattern, x, g, bias, relu):
    """Compare with float64, each element within a tolerance for the sum of the sizes of what was added."""
    y, gx, gv, gb = got
    tolerance = 1e-5 if x.dtype is torch.float32 else 1e-13
    mask = y > 0
    weight, x, g = weight.double(), x.double(), g.double()
    shift = torch.zeros(weight.shape[0], dtype=torch.float64) if bias is None else bias.double()
    wanted = x @ weight.t() + shift
    if relu:
        wanted, g = wanted.relu(), g * mask
    position = pattern.flat_by_position()

    def near(a, b, size):
        assert a.shape == b.shape
        assert a.is_contiguous()
        assert bool(((a.double() - b).abs() <= tolerance * (1 + size)).all())

    near(y, wanted, x.abs() @ weight.abs().t() + shift.abs())
    if gx is not None:
        near(gx, g @ weight, g.abs() @ weight.abs())
    near(gv, (g.t() @ x).reshape(-1)[position], (g.abs().t() @ x.abs()).reshape(-1)[position])
    if bias is None:
        assert gb is None
    else:
        near(gb, g.sum(0), g.abs().sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_matches_dense(compiled, rows, columns, batch, dtype):
    x, g = torch.randn(batch, columns, dtype=dtype), torch.randn(batch, rows, dtype=dtype)
    for wide in (False, True):
        weight, pattern, values = make(rows, columns, 0.3, dtype, wide)
        assert pattern.wide is wide
        for relu in (False, True):
            for bias in (None, torch.randn(rows, dtype=dtype)):
                check(results(pattern, values, x, g, bias, relu), weight, pattern, x, g, bias, relu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), [(37, 53), (2, 4500), (4500, 2)])
def test_first_layer_needs_no_input_gradient(compiled, rows, columns, dtype):
    weight, pattern, values = make(rows, columns, 0.3, dtype)
    x, g, bias = (
        torch.randn(130, columns, dtype=dtype),
        torch.randn(130, rows, dtype=dtype),
        torch.randn(rows, dtype=dtype),
    )
    got = results(pattern, values, x, g, bias, True, input=False)
    assert got[1] is None
    check(got, weight, pattern, x, g, bias, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), [(21, 9001), (9001, 21)])
def test_operands_larger_than_the_cache(compiled, rows, columns, dtype):
    weight, pattern, values = make(rows, columns, 0.05, dtype)
    x, g, bias = (
        torch.randn(70, columns, dtype=dtype),
        torch.randn(70, rows, dtype=dtype),
        torch.randn(rows, dtype=dtype),
    )
    check(results(pattern, values, x, g, bias, True), weight, pattern, x, g, bias, True)


@pytest.mark.parametrize(
    ("rows", "columns", "batch"), [(300, 400, 1000), (40, 9001, 65), (9001, 40, 65), (33, 64, 5000), (700, 900, 33)]
)
def test_results_do_not_depend_on_threads(compiled, rows, columns, batch):
    _, pattern, values = make(rows, columns, 0.2, torch.float32)
    x, g, bias = torch.randn(batch, columns), torch.randn(batch, rows), torch.randn(rows)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(
                results(pattern, values, x, g, bias, True) + results(pattern, values, x, g, bias, True, input=False)
            )
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert a is b is None or torch.equal(a, b)


def test_no_nonzero_at_all(compiled):
    _, pattern, values = make(20, 30, 0.0, torch.float32)
    y, gx, gv, gb = results(pattern, values, torch.ones(40, 30), torch.ones(40, 20), torch.ones(20), False)
    assert torch.equal(y, torch.ones(40, 20))
    assert torch.equal(gx, torch.zeros(40, 30))
    assert gv.numel() == 0
    assert torch.equal(gb, torch.full((20,), 40.0))


def test_any_strides(compiled):
    weight, pattern, values = make(37, 53, 0.3, torch.float64)
    bias = torch.randn(37, dtype=torch.float64)
    wide_x, wide_g = torch.randn(70, 60, dtype=torch.float64), torch.randn(70, 50, dtype=torch.float64)
    feature_major = torch.randn(53, 70, dtype=torch.float64).t(), torch.randn(37, 70, dtype=torch.float64).t()
    for x, g in ((wide_x[:, 3:56], wide_g[:, 5:42]), feature_major):
        check(results(pattern, values, x, g, bias, True), weight, pattern, x, g, bias, True)


def test_relu_passes_nan_on(compiled):
    weight, pattern, values = make(20, 30, 1.0, torch.float32)
    y, gx, _, gb = results(pattern, values, torch.full((40, 30), torch.nan), torch.ones(40, 20), torch.zeros(20), True)
    assert torch.isnan(y[:, weight.abs().sum(1) > 0]).all()
    assert gb.tolist() == [40.0 if row else 0.0 for row in (weight.abs().sum(1) > 0).tolist()]
    torch.testing.assert_close(gx, weight.sum(0).expand(40, -1))
