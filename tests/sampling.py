"""Samples of full products: what runs every time, and what only ``pytest -m exhaustive`` runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from math import gcd
from typing import Any

import pytest

everything = False
"""Whether the whole products are wanted; ``conftest.py`` sets it before tests are collected."""


def rotated(first: Iterable[Any], *others: Iterable[Any], each: int = 1, share: tuple[int, int] = (0, 1)) -> list[Any]:
    """Parameters of the whole product, of which a sample runs by default; the rest, marked ``exhaustive``, is there
    where everything is wanted.

    Every value of ``first`` runs with ``each`` combinations of the other axes. These rotate, so that every combination of
    the others runs too, as long as ``first`` has values enough. Suites that ask the same of the same values may share
    them: with ``share=(1, 3)`` a suite runs the second of every three, and leaves the others to other suites.

    Args:
        first: The axis of which every value runs.
        others: The other axes.
        each: Combinations of the others per value, >= 1.
        share: Which of how many parts of ``first`` runs by default.

    Returns:
        One ``pytest.param`` per point of the product, the sample first.
    """
    combinations = list(itertools.product(*others))
    chosen, rest = [], []
    part, parts = share
    for number, value in enumerate(first):
        picked = set(_picks(len(combinations), number // parts, each)) if number % parts == part else set()
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
