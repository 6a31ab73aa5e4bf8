"""Patterns: which weights are active together, and within which scope a budget holds."""

from dst.pieces.patterns import NM, Block, Diagonal, FanIn, Head, Neuron, TransposableNM, Unstructured, best_per_scope

__all__ = ["NM", "Block", "Diagonal", "FanIn", "Head", "Neuron", "TransposableNM", "Unstructured", "best_per_scope"]
