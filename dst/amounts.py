"""How many connections an update drops, where the weights decide."""

from dst.pieces.amounts import BelowThreshold, BelowZero

__all__ = ["BelowThreshold", "BelowZero"]
