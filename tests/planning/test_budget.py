"""Counts of dropped and grown connections that add up to the budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dst.planning.budget import Change, leave_none_empty, only_shrinking, plan_change, scaled
from dst.types import LayerStat


@pytest.mark.parametrize(
    ("active", "budget", "settings", "expected"),
    [
        (50, 50, {"fraction": 0.3}, Change(15, 15)),
        (50, 40, {"fraction": 0.25}, Change(20, 10)),  # down by 10, and a quarter of the 40 replaced
        (50, 60, {"fraction": 0.3}, Change(15, 25)),
        (50, 40, {"fraction": 0.3, "grows": False}, Change(10, 0)),
        (50, 60, {"fraction": 0.3, "grows": False}, Change(0, 0)),
        (50, 50, {"fraction": 0.9, "amount": 7}, Change(7, 7)),
        (50, 5, {"fraction": 0.9, "amount": 7}, Change(50, 5)),
        (50, 50, {"fraction": 0.9, "surplus": 0.2}, Change(0, 10)),
        (60, 50, {"fraction": 0.9, "surplus": 0.1}, Change(10, 5)),
        (60, 50, {"fraction": 0.9, "surplus": 0.0}, Change(10, 0)),
        (90, 90, {"fraction": 0.0, "surplus": 0.5}, Change(0, 10)),  # no more than there are positions
    ],
)
def test_by_hand(active, budget, settings, expected):
    assert plan_change(active, budget, 100, **{"grows": True, **settings}) == expected


counts = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@given(counts, st.floats(0, 1), st.data())
def test_scaled(active, share, data):
    limits = [a + data.draw(st.integers(0, 40)) for a in active]
    total = len(active) + round(share * (sum(limits) - len(active)))
    result = scaled(active, total, limits)
    assert sum(result) == total
    assert all(1 <= r <= limit for r, limit in zip(result, limits, strict=True))
    assert scaled(active, sum(active), limits) == active
    if total <= sum(active):
        assert all(r <= a for r, a in zip(result, active, strict=True))
        # No limit is in the way: what lies above one is in proportion, to a weight.
        share = (total - len(active)) / max(1, sum(active) - len(active))
        assert all(abs(r - 1 - share * (a - 1)) < 1 for r, a in zip(result, active, strict=True))
    else:
        assert all(r >= a for r, a in zip(result, active, strict=True))


@given(counts, st.data())
def test_only_shrinking(active, data):
    wanted = [max(1, a + data.draw(st.integers(-5, 2))) for a in active]
    result = only_shrinking(active, wanted)
    assert all(r <= a for r, a in zip(result, active, strict=True))
    assert sum(result) == min(sum(wanted), sum(active))
    if all(w <= a for w, a in zip(wanted, active, strict=True)):
        assert result == wanted


def test_a_layer_that_would_end_empty_takes_one_from_the_one_that_grows_most():
    stats = [LayerStat(9, 0, 0.0), LayerStat(9, 0, 0.0), LayerStat(9, 2, 0.0), LayerStat(9, 0, 0.0)]
    changes = [Change(3, 0), Change(3, 6), Change(3, 4), Change(1, 0)]
    assert leave_none_empty(stats, changes) == [Change(3, 1), Change(3, 4), Change(3, 4), Change(1, 1)]
    unchanged = [Change(3, 1), Change(3, 6), Change(3, 0), Change(1, 1)]
    assert leave_none_empty(stats, unchanged) == unchanged
