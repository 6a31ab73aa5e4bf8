"""Samples of full products: what runs every time, and what only ``pytest -m exhaustive`` runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from math import gcd
from typing import Any

import pytest

everything = False
"""Whether the whole products are wanted; ``conftest.py`` sets it before tests are collected."""


def rotated(first: Iterable[Any], *others: Iterable[Any], each: int = 1) -> list[Any]:
    """Parameters of the whole product, of which a sample runs by default; the rest, marked ``exhaustive``, is there
    where everything is wanted.

    Every value of ``first`` runs with ``each`` combinations of the other axes. These rotate, so that every combination of
    the others runs too, as long as ``first`` has values enough.

    Args:
        first: The axis of which every value runs.
        others: The other axes.
        each: Combinations of the others per value, >= 1.

    Returns:
        One ``pytest.param`` per point of the product, the sample first.
    """
    combinations = list(itertools.product(*others))
    chosen, rest = [], []
    for start, value in enumerate(first):
        picked = set(_picks(len(combinations), start, each))
        for i, combination in enumerate(combinations):
            if i in picked:
                chosen.append(pytest.param(value, *combination))
            elif everything:
                rest.append(pytest.param(value, *combination, marks=pytest.mark.exhaustive))
    return [*chosen, *rest]


def _picks(size: int, start: int, each: int) -> Sequence[int]:
    # A stride without a common divisor visits every combination; it also spreads those of one value.
    stride = next(s for s in range(max(1, round(size * 0.62)), 2 * size + 1) if gcd(s, size) == 1)
    return [(start + k * stride) % size for k in range(min(each, size))]
