"""Samples of full products of parameters. ``pytest -m exhaustive`` runs the rest."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from math import gcd
from typing import Any

import pytest

everything = False
"""Whether to run whole products; ``conftest.py`` sets it before tests are collected."""


def rotated(first: Iterable[Any], *others: Iterable[Any], each: int = 1, share: tuple[int, int] = (0, 1)) -> list[Any]:
    """Return the parameters of a full product, of which a sample runs by default and ``-m exhaustive`` runs the rest.

    Every value of ``first`` runs with ``each`` combinations of the other axes. The combinations rotate, so that each of them
    runs too if ``first`` has enough values. Suites that test the same property may share the values: with ``share=(1, 3)`` a
    suite runs the second of every three values.

    Args:
        first: The axis whose values all run.
        others: The other axes.
        each: Combinations of the other axes per value, >= 1.
        share: The part of ``first`` that runs by default, and the number of parts.

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
