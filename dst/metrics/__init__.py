"""What a sparse network costs, as pure functions."""

from dst.metrics.flops import (
    inference_flops,
    inference_ratio,
    layer_macs,
    rigl_training_flops,
    static_training_flops,
    training_ratio,
    uncounted,
)

__all__ = [
    "inference_flops",
    "inference_ratio",
    "layer_macs",
    "rigl_training_flops",
    "static_training_flops",
    "training_ratio",
    "uncounted",
]
