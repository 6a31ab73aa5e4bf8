"""Schedules: clocks, drop fractions and densities over time."""

from dst.pieces.schedules import Alternating, Constant, Cosine, Cubic, Every, InversePower, Linear, Never, Stepwise

__all__ = ["Alternating", "Constant", "Cosine", "Cubic", "Every", "InversePower", "Linear", "Never", "Stepwise"]
