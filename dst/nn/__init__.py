"""Truly sparse modules."""

from __future__ import annotations

from dst.nn.inference import InferenceChain, optimize_for_inference
from dst.nn.sparse_conv import SparseConv2d
from dst.nn.sparse_linear import FeatureMajorLinear, SparseLinear, remap

__all__ = [
    "FeatureMajorLinear",
    "InferenceChain",
    "SparseConv2d",
    "SparseLinear",
    "optimize_for_inference",
    "remap",
]
