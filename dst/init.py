"""Inits: how the first mask is chosen."""

from dst.pieces.init import FromFile, Grasp, Importance, Magnitude, Random, Snip, Synflow

__all__ = ["FromFile", "Grasp", "Importance", "Magnitude", "Random", "Snip", "Synflow"]
