"""Counting, selecting, dropping and growing."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dst.topology.counts import count_active, drop_count
from dst.topology.rewiring import Rewiring, fill_at_, rewire
from dst.topology.selection import best_free, select_top, top_indices

nan, inf = math.nan, math.inf


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drop_and_grow(
    mask: Tensor,
    drop_scores: Tensor,
    grow_scores: Tensor,
    count: int,
    *,
    regrow_dropped: bool,
    generator: torch.Generator,
) -> Rewiring:
    """``rewire`` for a mask and scores of every position."""
    active = mask.reshape(-1).nonzero().squeeze(1)
    return rewire(
        active,
        drop_scores.take(active),
        mask.numel(),
        count,
        count,
        lambda number, excluded: best_free(grow_scores, number, excluded, generator),
        regrow_dropped=regrow_dropped,
        generator=generator,
    )


def bits(text: str) -> Tensor:
    return torch.tensor([c == "1" for c in text])


# --- one update of eight connections, worked by hand ----------------------------------------------------------------

#          position: 0     1     2     3     4     5     6     7
TABLE = [
    pytest.param(
        # active 0-3, two dropped: the smallest are 1 and 2; the largest gradients among all not kept are at 5 and 7.
        "11110000",
        [0.9, -0.1, 0.2, -0.8, 0.0, 0.0, 0.0, 0.0],
        [9.0, 0.1, 0.2, 9.0, 0.3, -0.9, 0.4, 0.8],
        2,
        True,
        "10010101",
        [5, 7],
        [1, 2],
        id="drop-two-grow-two",
    ),
    pytest.param(
        # 1 and 2 are dropped, but 2 has the largest gradient of all candidates and comes back: one position changes.
        "11110000",
        [0.9, -0.1, 0.2, -0.8, 0.0, 0.0, 0.0, 0.0],
        [9.0, 0.1, 5.0, 9.0, 0.3, -0.9, 0.4, 0.8],
        2,
        True,
        "10110100",
        [5],
        [1],
        id="just-dropped-regrows",
    ),
    pytest.param(
        # The same, where just-dropped connections are no candidates: 7 is next in line.
        "11110000",
        [0.9, -0.1, 0.2, -0.8, 0.0, 0.0, 0.0, 0.0],
        [9.0, 0.1, 5.0, 9.0, 0.3, -0.9, 0.4, 0.8],
        2,
        False,
        "10010101",
        [5, 7],
        [1, 2],
        id="no-regrowth",
    ),
    pytest.param(
        # Both dropped ones come back: nothing changes.
        "11110000",
        [0.9, -0.1, 0.2, -0.8, 0.0, 0.0, 0.0, 0.0],
        [0.0, 6.0, 5.0, 0.0, 0.3, -0.9, 0.4, 0.8],
        2,
        True,
        "11110000",
        [],
        [],
        id="all-regrow",
    ),
    pytest.param(
        # Connection 2 was grown before and is still zero, like every inactive one. Only active ones may be dropped: the
        # lowest active are 2 (zero) and 6.
        "10100011",
        [0.5, 0.0, 0.0, 0.0, 0.0, 0.0, -0.3, 0.7],
        [0.0, 0.1, 0.0, 0.9, 0.2, 0.3, 0.0, 0.0],
        2,
        False,
        "10010101",
        [3, 5],
        [2, 6],
        id="grown-zero-is-active",
    ),
    pytest.param(
        # One is dropped: the grown zero at 2, and not one of the inactive zeros; three larger ones stay.
        "10100011",
        [0.5, 0.0, 0.0, 0.0, 0.0, 0.0, -0.3, 0.7],
        [0.0, 0.1, 0.0, 0.9, 0.2, 0.3, 0.0, 0.0],
        1,
        True,
        "10010011",
        [3],
        [2],
        id="zero-among-zeros",
    ),
    pytest.param(
        # Three are to be dropped, but only two positions are free: with no regrowth two change places.
        "11111100",
        [0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.6],
        3,
        False,
        "11110011",
        [6, 7],
        [4, 5],
        id="no-room",
    ),
    pytest.param(
        # The same with regrowth: three are dropped, the two free ones and the best dropped one (3) are grown.
        "11111100",
        [0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.3, 0.2, 0.1, 0.5, 0.6],
        3,
        True,
        "11110011",
        [6, 7],
        [4, 5],
        id="regrowth-fills",
    ),
    pytest.param(
        # NaN drops first and grows last.
        "11110000",
        [0.1, nan, 0.2, 0.3, nan, nan, nan, nan],
        [nan, 0.0, nan, nan, nan, nan, 0.1, nan],
        1,
        False,
        "10110010",
        [6],
        [1],
        id="nan",
    ),
    pytest.param(
        "11110000",
        [0.1, 0.2, 0.3, 0.4, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0],
        0,
        True,
        "11110000",
        [],
        [],
        id="nothing-to-drop",
    ),
]


@pytest.mark.parametrize(("before", "weights", "gradients", "count", "regrow", "after", "grown", "dropped"), TABLE)
def test_hand_worked_update(before, weights, gradients, count, regrow, after, grown, dropped):
    mask = bits(before)
    rewiring = drop_and_grow(
        mask,
        torch.tensor(weights).abs(),
        torch.tensor(gradients).abs(),
        count,
        regrow_dropped=regrow,
        generator=generator(),
    )
    assert rewiring.grown.tolist() == grown
    assert rewiring.dropped.tolist() == dropped
    assert mask.tolist() == bits(before).tolist()  # deciding changes nothing
    assert rewiring.apply_(mask).tolist() == bits(after).tolist()


def test_a_kept_connection_is_never_grown_even_where_all_candidates_score_minus_infinity():
    rewiring = drop_and_grow(
        bits("11110000"),
        torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0]),
        torch.tensor([inf, inf, inf, inf, -inf, nan, -inf, nan]),
        3,
        regrow_dropped=False,
        generator=generator(),
    )
    assert rewiring.dropped.tolist() == [0, 1, 2]
    assert len(set(rewiring.grown.tolist()) & {4, 5, 6, 7}) == 3


def test_ties_are_broken_by_the_generator_and_not_by_position():
    chosen = torch.zeros(8)
    for seed in range(200):
        rewiring = drop_and_grow(
            bits("11110000"),
            torch.ones(8),
            torch.ones(8),
            1,
            regrow_dropped=False,
            generator=generator(seed),
        )
        chosen[rewiring.grown] += 1
        chosen[rewiring.dropped] += 1
    assert chosen.sum() == 400
    assert chosen.min() >= 25  # 50 expected at each of the eight positions


@given(
    st.integers(1, 60).flatmap(
        lambda n: st.tuples(
            st.lists(st.booleans(), min_size=n, max_size=n),
            st.lists(st.integers(-3, 3), min_size=n, max_size=n),
            st.lists(st.integers(-3, 3), min_size=n, max_size=n),
        )
    ),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 5),
)
def test_drop_and_grow_properties(lists, fraction, regrow, seed):
    """Many ties, any mask: counts are exact, and the kept are at least as good as the dropped, the grown as the not grown."""
    mask, drop, grow = (torch.tensor(x) for x in lists)
    drop, grow = drop.float(), grow.float()
    active = int(mask.sum())
    count = drop_count(active, fraction)
    rewiring = drop_and_grow(mask, drop, grow, count, regrow_dropped=regrow, generator=generator(seed))
    after = rewiring.apply_(mask.clone())
    assert int(after.sum()) == active
    assert len(rewiring.grown) == len(rewiring.dropped) <= count
    assert not mask[rewiring.grown].any()
    assert mask[rewiring.dropped].all()
    if not regrow:
        assert len(rewiring.grown) == min(count, len(mask) - active)
        left_out = ~after & ~mask
        if len(rewiring.grown) and left_out.any():
            assert grow[rewiring.grown].min() >= grow[left_out].max()
        kept = mask & after
        if len(rewiring.dropped) and kept.any():
            assert drop[rewiring.dropped].max() <= drop[kept].min()
    elif count:
        # What was dropped and not grown again is no better a candidate than anything that was grown.
        if len(rewiring.grown):
            assert grow[rewiring.grown].min() >= grow[rewiring.dropped].max()
        kth_lowest = drop[mask].sort().values[count - 1]
        assert len(rewiring.dropped) == 0 or drop[rewiring.dropped].max() <= kth_lowest
    again = drop_and_grow(mask, drop, grow, count, regrow_dropped=regrow, generator=generator(seed))
    assert torch.equal(again.grown, rewiring.grown)
    assert torch.equal(again.dropped, rewiring.dropped)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "rows"])
def test_positions_are_row_major_whatever_the_strides(layout):
    values = torch.arange(24.0).view(2, 3, 2, 2)
    if layout == "channels_last":
        values = values.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        values = values.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    elif layout == "rows":
        values = torch.cat([values, values])[:2]
    assert fill_at_(values.clone(), torch.tensor([5, 23]), -1.0).reshape(-1)[[5, 23]].tolist() == [-1, -1]
    mask = values > 11
    rewiring = drop_and_grow(mask, values, 100 - values, 3, regrow_dropped=False, generator=generator())
    assert rewiring.dropped.tolist() == [12, 13, 14]
    assert rewiring.grown.tolist() == [0, 1, 2]
    expected = [0, 1, 2, *range(15, 24)]
    assert rewiring.apply_(mask).reshape(-1).nonzero().squeeze(1).tolist() == expected


# --- selection ------------------------------------------------------------------------------------------------------

scores_and_candidates = st.integers(1, 80).flatmap(
    lambda n: st.tuples(
        st.lists(st.one_of(st.integers(-3, 3).map(float), st.sampled_from([nan, inf, -inf])), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
    )
)


@given(scores_and_candidates, st.floats(0, 1), st.integers(0, 3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_select_top_takes_exactly_the_best_candidates(lists, share, seed, dtype):
    scores, candidates = torch.tensor(lists[0], dtype=dtype), torch.tensor(lists[1])
    count = math.floor(share * int(candidates.sum()))
    selected = select_top(scores, count, candidates, generator(seed))
    assert selected.dtype == torch.bool
    assert selected.shape == scores.shape
    assert int(selected.sum()) == count
    assert not (selected & ~candidates).any()
    values = scores.nan_to_num(nan=-inf, posinf=inf, neginf=-inf)
    rest = candidates & ~selected
    if count and rest.any():
        assert values[selected].min() >= values[rest].max()
    assert torch.equal(select_top(scores, count, candidates, generator(seed)), selected)


def test_nan_is_lowest():
    scores = torch.tensor([nan, 1.0, nan, -5.0, -2.0])
    everything = torch.ones(5, dtype=torch.bool)
    assert select_top(scores, 3, everything, generator()).tolist() == [False, True, False, True, True]
    assert int(select_top(scores, 4, everything, generator()).sum()) == 4


def test_select_top_depends_on_the_generator_only_where_scores_tie():
    everything = torch.ones(50, dtype=torch.bool)
    tied = {tuple(select_top(torch.zeros(50), 10, everything, generator(s)).tolist()) for s in range(8)}
    assert len(tied) == 8
    distinct = {tuple(select_top(torch.arange(50.0), 10, everything, generator(s)).tolist()) for s in range(8)}
    assert distinct == {(False,) * 40 + (True,) * 10}


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 2, 2)])
def test_select_top_keeps_the_shape(shape):
    scores = torch.randn(shape)
    selected = select_top(scores, 3, torch.ones(shape, dtype=torch.bool), generator())
    assert set(scores[selected].tolist()) == set(scores.flatten().topk(3).values.tolist())


@pytest.mark.parametrize("count", [-1, 3])
def test_select_top_refuses_more_than_there_are(count):
    candidates = torch.tensor([True, False, True, False])
    with pytest.raises(ValueError, match=r"cannot select -?\d of 2 candidates"):
        select_top(torch.ones(4), count, candidates, generator())


@pytest.mark.parametrize("kind", ["normal", "tied", "sorted", "mostly nan", "few distinct", "spike"])
@pytest.mark.parametrize("count", [1, 40, 1500, 4900, 5100, 40_000])
def test_large_vectors_take_the_short_cut_and_the_same_choice(kind, count):
    """Above a size a sample estimates the threshold: the choice must be that of a full sort."""
    size = 40_000
    values = torch.randn(size)
    if kind == "tied":
        values = torch.zeros(size)
    elif kind == "sorted":
        values = torch.arange(float(size))
    elif kind == "mostly nan":
        values[torch.rand(size) < 0.9] = nan
    elif kind == "few distinct":
        values = values.round()
    elif kind == "spike":
        values = torch.zeros(size)
        values[17:97] = torch.rand(80) + 1  # what a sample hardly sees
    chosen = top_indices(values, count, generator(3))
    assert len(chosen.unique()) == len(chosen) == count
    assert torch.equal(chosen, chosen.sort().values)
    expected = values.nan_to_num(nan=-inf).sort(descending=True).values[:count]
    assert torch.equal(values[chosen].nan_to_num(nan=-inf).sort(descending=True).values, expected)
    assert torch.equal(top_indices(values, count, generator(3)), chosen)


# --- counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "density", "count"),
    [
        (10, 0.7, 7),
        (10, 0.1, 1),
        (1000, 0.001, 1),
        (30, 0.9, 27),
        (7, 0.5, 4),
        (3, 0.01, 1),
        (5, 1, 5),
        (0, 0.5, 0),
        (9, 0.0, 0),
    ],
)
def test_count_active(weights, density, count):
    assert count_active(weights, density) == count


@given(st.integers(1, 10**8), st.integers(1, 10**6))
def test_count_active_reads_decimals_exactly(weights, millionths):
    zeros = math.floor((1 - Fraction(millionths, 10**6)) * weights)
    assert count_active(weights, millionths / 10**6) == weights - zeros


@pytest.mark.parametrize(
    ("active", "fraction", "count"), [(100, 0.29, 29), (10, 0.3, 3), (9, 0.3, 2), (3, 0.3, 0), (5, 1.0, 5), (7, 0.0, 0)]
)
def test_drop_count_is_the_floor(active, fraction, count):
    assert drop_count(active, fraction) == count


@given(st.integers(0, 10**7), st.integers(0, 1000))
def test_drop_count_never_exceeds_the_active(active, thousandths):
    assert drop_count(active, thousandths / 1000) == active * thousandths // 1000
