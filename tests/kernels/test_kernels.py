"""The compiled engine against the one of torch's operations and against dense arithmetic."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from dst import kernels
from dst.errors import ConfigurationError
from dst.kernels import Kernels, TorchKernels, build
from dst.kernels.native import ISA
from dst.topology.selection import best_indices, partition, tie_order

COMPILED = kernels.load()
ENGINES = [TorchKernels()] if COMPILED is None else [TorchKernels(), COMPILED]
SIZES = [(1, 1), (7, 1), (1, 17), (17, 129), (129, 7), (33, 64)]
BATCHES = [0, 1, 2, 7, 16, 129]


@pytest.fixture(params=ENGINES, ids=lambda engine: engine.name)
def engine(request):
    return request.param


@pytest.fixture
def compiled():
    if COMPILED is None:
        pytest.skip("no compiler on this machine")
    before = COMPILED.isa
    yield COMPILED
    COMPILED.isa = before


def make(engine, rows, columns, density, dtype=torch.float64):
    weight = torch.randn(rows, columns, dtype=dtype) * (torch.rand(rows, columns) < density)
    flat = weight.reshape(-1).nonzero().squeeze(1)
    pattern = engine.pattern(flat, rows, columns)
    return weight, pattern, weight.reshape(-1)[pattern.flat_by_position()]


def results(engine, weight, pattern, values, x, g, bias, relu):
    row_values = torch.empty_like(values)
    engine.refresh(pattern, values, row_values)
    xt = engine.feature_major(x)
    y = engine.forward(pattern, row_values, xt, bias, relu)
    gx, gv, gb, gt = engine.backward(pattern, values, xt, g, y if relu else None, input=True, bias=True)
    return y, gx, gv, gb, gt.t()


def dense_results(weight, pattern, x, g, bias, relu):
    y = x @ weight.t() + bias
    g = g * (y > 0) if relu else g
    y = y.relu() if relu else y
    return y, g @ weight, (g.t() @ x).reshape(-1)[pattern.flat_by_position()], g.sum(0), g


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_matches_dense(engine, rows, columns, batch, relu):
    weight, pattern, values = make(engine, rows, columns, 0.3)
    x, g = torch.randn(batch, columns, dtype=torch.float64), torch.randn(batch, rows, dtype=torch.float64)
    bias = torch.randn(rows, dtype=torch.float64)
    got = results(engine, weight, pattern, values, x, g, bias, relu)
    for a, b in zip(got, dense_results(weight, pattern, x, g, bias, relu), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("isa", ISA)
def test_every_instruction_set(compiled, isa, dtype):
    compiled.isa = isa
    if compiled.isa != isa:
        pytest.skip(f"this machine has no {isa}")
    tolerance = 1e-4 if dtype is torch.float32 else 1e-11
    for batch in (1, 5, 64, 100, 300):
        weight, pattern, values = make(compiled, 37, 53, 0.25, dtype)
        x, g, bias = (
            torch.randn(batch, 53, dtype=dtype),
            torch.randn(batch, 37, dtype=dtype),
            torch.randn(37, dtype=dtype),
        )
        got = results(compiled, weight, pattern, values, x, g, bias, True)
        for a, b in zip(got, dense_results(weight, pattern, x, g, bias, True), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch", [1, 130])
def test_results_do_not_depend_on_threads(compiled, batch):
    weight, pattern, values = make(compiled, 300, 400, 0.5, torch.float32)
    x, g, bias = torch.randn(batch, 400), torch.randn(batch, 300), torch.randn(300)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(results(compiled, weight, pattern, values, x, g, bias, True))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


def test_empty_rows_and_columns(engine):
    weight = torch.zeros(5, 6, dtype=torch.float64)
    weight[1, 2], weight[1, 5], weight[4, 2] = 1.0, -2.0, 3.0
    pattern = engine.pattern(weight.reshape(-1).nonzero().squeeze(1), 5, 6)
    assert pattern.column_pointers.tolist() == [0, 0, 0, 2, 2, 2, 3]
    assert pattern.row_pointers.tolist() == [0, 0, 2, 2, 2, 3]
    assert pattern.flat().tolist() == [8, 11, 26]
    assert pattern.flat_by_position().tolist() == [8, 26, 11]
    assert torch.equal(pattern.mask(), weight != 0)
    values = weight.reshape(-1)[pattern.flat_by_position()]
    x, g = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    bias = torch.zeros(5, dtype=torch.float64)
    got = results(engine, weight, pattern, values, x, g, bias, False)
    for a, b in zip(got, dense_results(weight, pattern, x, g, bias, False), strict=True):
        torch.testing.assert_close(a, b)


def test_no_nonzero_at_all(engine):
    weight, pattern, values = make(engine, 4, 3, 0.0)
    x, g, bias = (torch.ones(n, dtype=torch.float64) for n in ((2, 3), (2, 4), 4))
    y, gx, gv, gb, _ = results(engine, weight, pattern, values, x, g, bias, False)
    assert y.tolist() == [[1.0] * 4] * 2
    assert gx.tolist() == [[0.0] * 3] * 2
    assert gv.numel() == 0
    assert gb.tolist() == [2.0] * 4


def test_relu_passes_nan_on(engine):
    pattern = engine.pattern(torch.tensor([0]), 1, 1)
    x = torch.full((3, 1), torch.nan)
    y = engine.forward(pattern, torch.ones(1), engine.feature_major(x), None, True)
    assert torch.isnan(y).all()


def test_index_width(engine, compiled):
    assert compiled.pattern(torch.tensor([5, 65_535]), 3, 65_536).row_indices.dtype is torch.uint16
    wide = compiled.pattern(torch.tensor([5, 65_536]), 3, 65_537)
    assert wide.row_indices.dtype is torch.int32
    assert wide.flat().tolist() == [5, 65_536]
    x = torch.zeros(2, 65_537)
    x[:, 65_536] = torch.tensor([2.0, 3.0])
    y = compiled.forward(wide, torch.tensor([1.0, 10.0]), compiled.feature_major(x), None, False)
    assert y.tolist() == [[20.0, 0.0, 0.0], [30.0, 0.0, 0.0]]


def test_match(engine):
    old = engine.pattern(torch.tensor([0, 3, 4, 7, 8]), 3, 3)
    kept = torch.tensor([0, 4, 8])
    new = engine.pattern(torch.tensor([0, 1, 4, 6, 8]), 3, 3)
    entries = old.flat_by_position()
    source = engine.match(old, new)
    carried = torch.where(source >= 0, entries[source.clamp(min=0)], -1)
    assert carried.tolist() == [flat if flat in kept else -1 for flat in new.flat_by_position().tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("k", "spread"), [(0, 100), (1, 100), (50, 3), (200, 5), (4000, 1000), (6000, 2)])
def test_running_top_k_is_exact_with_ties(engine, k, spread, dtype):
    matrix = torch.randint(-spread, spread + 1, (90, 100)).to(dtype)
    exclude = torch.randperm(9000)[:2000].sort().values
    score = matrix.abs().reshape(-1).clone()
    score[exclude] = -1
    by_tie_order = tie_order(torch.arange(9000), 123).argsort()
    wanted = by_tie_order[score[by_tie_order].sort(descending=True, stable=True).indices][:k].sort().values
    top = engine.top_k(k, dtype, 123)
    for first in range(0, 90, 32):
        tile = matrix[first : first + 32].clone()
        low, high = first * 100, first * 100 + tile.numel()
        top.update(tile, low, exclude[(exclude >= low) & (exclude < high)])
    assert torch.equal(top.finish(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "ties", "few", "sampled", "unsampled", "infinite", "nan", "zero"])
def test_top_k_of_large_tiles(engine, kind, dtype):
    """A first tile of this size sets a threshold from a sample: positions 0, 13, 26, ..."""
    size, k = 80_000, 700
    scores = torch.randn(2 * size, dtype=dtype)
    if kind == "ties":
        scores = scores.mul_(3).round_()
    elif kind == "few":
        scores[torch.arange(2 * size) % 100 > 0] = 0
    elif kind == "zero":
        scores.zero_()
    elif kind == "infinite":
        scores[::50] = torch.inf
    elif kind == "nan":
        scores[::3] = torch.nan
    elif kind in ("sampled", "unsampled"):
        is_sampled = torch.arange(2 * size) % 13 == 0
        scores[is_sampled if kind == "sampled" else ~is_sampled] *= 100
    exclude = torch.arange(0, 2 * size, 7)
    top = engine.top_k(k, dtype, 5)
    for base in (0, size):
        within = exclude[(exclude >= base) & (exclude < base + size)]
        top.update(scores[base : base + size].clone().view(80, 1000), base, within)
    ranked = scores.abs()
    ranked[exclude] = torch.nan
    assert torch.equal(top.finish(), best_indices(ranked, k, 5))


def test_flat_positions_of_rows(engine):
    pattern = engine.pattern(torch.tensor([0, 3, 4, 7, 8]), 3, 3)
    assert engine.flat(pattern).tolist() == [0, 3, 4, 7, 8]
    assert engine.flat(pattern, 1, 3).tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("shape", [(40, 30), (1, 900), (900, 1), (3, 70_000)])
def test_rewiring_a_pattern(engine, shape):
    weights = shape[0] * shape[1]
    order = torch.randperm(weights)
    active, dropped = order[: weights // 3].sort().values, order[: weights // 9].sort().values
    grown = order[weights // 3 : weights // 2].sort().values
    old = engine.pattern(active, *shape)
    wanted = engine.pattern(torch.cat([order[weights // 9 : weights // 3], grown]).sort().values, *shape)
    new, source = engine.rewire(old, grown, dropped)
    for name in ("column_pointers", "row_indices", "row_pointers", "column_indices", "permutation"):
        assert torch.equal(getattr(new, name), getattr(wanted, name)), name
        assert getattr(new, name).dtype is getattr(old, name).dtype
    assert torch.equal(source, engine.match(old, wanted))


@pytest.mark.parametrize(
    ("grown", "dropped"),
    [([3], []), ([2, 1], []), ([1, 1], []), ([9], []), ([-1], []), ([], [1]), ([], [4, 3]), ([5], [3, 5]), ([2], [9])],
)
def test_rewiring_refuses_what_does_not_fit(engine, grown, dropped):
    pattern = engine.pattern(torch.tensor([0, 3, 4, 7, 8]), 3, 3)
    with pytest.raises(ConfigurationError, match="do not fit the pattern"):
        engine.rewire(pattern, torch.tensor(grown, dtype=torch.int64), torch.tensor(dropped, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_remap_carries_entries(engine, dtype):
    entries, grown = torch.arange(1, 100_001).to(dtype), torch.full((100_000,), 7).to(dtype)
    source = torch.arange(100_000).flip(0)
    source[::3] = -1
    is_old = source >= 0
    for others, wanted in ((None, torch.zeros_like(grown)), (grown, grown)):
        out = engine.remap(entries, source, others)
        assert out.dtype is dtype
        assert torch.equal(out[is_old], entries[source[is_old]])
        assert torch.equal(out[~is_old], wanted[~is_old])
    assert engine.remap(entries[:0], torch.tensor([-1, -1])).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("keep", [0, 1, 500, 4999, 5000])
@pytest.mark.parametrize("spread", [2, 10_000])
def test_partition_is_that_of_torch(compiled, dtype, keep, spread):
    scores = torch.randint(-spread, spread, (5000,)).to(dtype) / 7
    scores[::11], scores[::13], scores[5] = torch.nan, -0.0, -torch.inf
    positions = torch.arange(5000) * 3
    kept, others = compiled.partition(positions, scores, keep, 99)
    wanted = partition(positions, scores, keep, 99)
    assert torch.equal(kept, wanted[0])
    assert torch.equal(others, wanted[1])


@pytest.mark.parametrize("sizes", [(0, 0), (0, 9), (9, 0), (300, 500)])
def test_cancel_removes_common_positions(engine, sizes):
    a, b = (torch.randperm(900)[:n].sort().values for n in sizes)
    first, second = engine.cancel(a, b)
    assert first.tolist() == sorted(set(a.tolist()) - set(b.tolist()))
    assert second.tolist() == sorted(set(b.tolist()) - set(a.tolist()))


@pytest.mark.parametrize("layout", ["batch-major", "feature-major", "every second", "expanded"])
def test_feature_major_of_any_layout(engine, layout):
    x = torch.randn(6, 10)
    x = {
        "batch-major": x,
        "feature-major": x.t().contiguous().t(),
        "every second": torch.randn(12, 20)[::2, ::2],
        "expanded": torch.randn(1, 10).expand(6, 10),
    }[layout]
    assert torch.equal(engine.feature_major(x), x.t())


def test_a_library_of_another_version_is_refused(tmp_path):
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" int dst_abi() { return -1; }')
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("no compiler on this machine")
    library = tmp_path / "other.so"
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    with pytest.raises(OSError, match="another version"):
        Kernels(library)


def test_build_without_a_compiler_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no C"):
        build.build(tmp_path / "k.so")


def test_build_reports_a_failing_compiler(tmp_path):
    with pytest.raises(build.BuildError, match="could not compile"):
        build.build(tmp_path / "k.so", compiler="false")
    assert not (tmp_path / "k.so").exists()


def test_fallback_is_chosen_and_said_once(monkeypatch):
    kernels.load.cache_clear()
    kernels.engine.cache_clear()
    monkeypatch.setenv("DST_KERNELS", "torch")
    try:
        with pytest.warns(RuntimeWarning, match="no compiled sparse kernels"):
            assert isinstance(kernels.engine(), TorchKernels)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kernels.engine()
    finally:
        kernels.load.cache_clear()
        kernels.engine.cache_clear()


def test_a_named_library_must_exist(monkeypatch, tmp_path):
    kernels.load.cache_clear()
    monkeypatch.setenv("DST_KERNELS", str(tmp_path / "absent.so"))
    try:
        with pytest.raises(ConfigurationError, match=r"absent\.so"):
            kernels.load()
    finally:
        kernels.load.cache_clear()


def test_an_install_without_a_compiler_succeeds(tmp_path):
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path)],
        cwd=root,
        env={**os.environ, "CXX": str(tmp_path / "no-compiler"), "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "sparse kernels not built" in done.stdout + done.stderr
    assert not list((tmp_path / "lib").rglob("_spmm*"))


def test_a_copied_pattern_reads_its_own_tensors(engine):
    pattern = engine.pattern(torch.tensor([0, 3, 5, 7]), 3, 3)
    assert pattern.by_row == (pattern.row_pointers.data_ptr(), pattern.column_indices.data_ptr())
    other = copy.deepcopy(pattern)
    assert other.by_row == (other.row_pointers.data_ptr(), other.column_indices.data_ptr()) != pattern.by_row
    assert other.by_column[2] == other.permutation.data_ptr()
    assert other.wide == pattern.wide
