"""Amounts: how many weights an update drops, decided from the weights instead of a fraction."""

from dst.pieces.amounts import BelowThreshold, BelowZero

__all__ = ["BelowThreshold", "BelowZero"]
