"""Confidence intervals over seeds, and Pareto fronts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dst.errors import ConfigurationError


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% confidence interval.

    Attributes:
        mean: Mean of the values.
        half: Half the width of the interval; None for a single value.
        n: Number of values.
    """

    mean: float
    half: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.half is None else f"{self.mean:.4g} ± {self.half:.2g}"

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.half is not None and abs(self.mean) > self.half


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95% confidence interval (Student's t) of at least one value."""
    n, mean = len(values), statistics.mean(values)  # exact: equal values have an interval of width zero
    if n == 1:
        return Interval(mean, None, 1)
    return Interval(mean, student_t95(n - 1) * statistics.stdev(values) / math.sqrt(n), n)


def student_t95(degrees: int) -> float:
    """Two-sided 95% quantile of Student's t distribution.

    Args:
        degrees: Degrees of freedom, at least 1.

    Raises:
        ConfigurationError: Fewer than one degree of freedom.
    """
    if degrees < 1:
        raise ConfigurationError(f"Student's t needs at least one degree of freedom, got {degrees}")
    # Imported here: SciPy takes long to import, and a single seed needs no quantile.
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))


def pareto_front(points: Mapping[str, tuple[float, float]]) -> tuple[str, ...]:
    """Labels of the points that no other point beats.

    Args:
        points: Label to cost (lower is better) and quality (higher is better).

    Returns:
        Labels, cheapest first. A point is left out if another is at least as good in both and better in one.
    """
    front = [
        label
        for label, (cost, quality) in points.items()
        if not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points.values())
    ]
    return tuple(sorted(front, key=lambda label: points[label]))
