"""Truly sparse modules."""

from __future__ import annotations

from dst.nn.sparse_linear import FeatureMajorLinear, SparseLinear, random_indices, remap

__all__ = ["FeatureMajorLinear", "SparseLinear", "random_indices", "remap"]
