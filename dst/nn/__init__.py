"""Truly sparse modules."""

from __future__ import annotations

from dst.nn.sparse_linear import FeatureMajorLinear, SparseLinear, remap

__all__ = ["FeatureMajorLinear", "SparseLinear", "remap"]
