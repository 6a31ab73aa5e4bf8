"""What a sparse network costs, as pure functions."""

from dst.metrics.conventions import CONVENTIONS, Convention
from dst.metrics.counting import Operations, WeightOperations, count_operations, layer_macs, uncounted
from dst.metrics.flops import (
    FlopsTable,
    flops_table,
    inference_flops,
    inference_ratio,
    rigl_training_flops,
    static_training_flops,
    training_ratio,
)
from dst.metrics.meter import FlopsMeter, TrainingFlops

__all__ = [
    "CONVENTIONS",
    "Convention",
    "FlopsMeter",
    "FlopsTable",
    "Operations",
    "TrainingFlops",
    "WeightOperations",
    "count_operations",
    "flops_table",
    "inference_flops",
    "inference_ratio",
    "layer_macs",
    "rigl_training_flops",
    "static_training_flops",
    "training_ratio",
    "uncounted",
]
