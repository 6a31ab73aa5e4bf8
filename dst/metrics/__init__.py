"""What a sparse network costs and how its topology fares: pure functions, and torchmetrics classes over them.

The classes are imported when they are first asked for, so that the functions need torch alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dst.metrics.conventions import CONVENTIONS, Convention
from dst.metrics.counting import Operations, WeightOperations, count_operations, layer_macs, uncounted
from dst.metrics.energy import Energy, EnergyMeter
from dst.metrics.flops import (
    FlopsRow,
    FlopsTable,
    flops_table,
    inference_flops,
    inference_ratio,
    rigl_training_flops,
    static_training_flops,
    training_ratio,
)
from dst.metrics.health import (
    chain_effective_masks,
    collapsed_layers,
    dead_inputs,
    dead_outputs,
    effective_density,
    effective_masks,
)
from dst.metrics.memory import Memory, PeakMemory, predict_memory
from dst.metrics.meter import FlopsMeter, TrainingFlops
from dst.metrics.topology import (
    exploration_rate,
    in_degree_histogram,
    in_degrees,
    mask_churn,
    mask_density,
    mask_overlap,
    nm_conformance,
)
from dst.metrics.training import gradient_norms, loss_spikes

if TYPE_CHECKING:
    from dst.metrics.diagnostics import (
        CollapsedLayers,
        DeadUnits,
        EffectiveDensity,
        ExplorationRate,
        GradientNorms,
        InDegreeHistogram,
        LossSpikes,
        MaskChurn,
        MaskDensity,
        MaskOverlap,
        NMConformance,
    )

_CLASSES = (
    "CollapsedLayers",
    "DeadUnits",
    "EffectiveDensity",
    "ExplorationRate",
    "GradientNorms",
    "InDegreeHistogram",
    "LossSpikes",
    "MaskChurn",
    "MaskDensity",
    "MaskOverlap",
    "NMConformance",
)

__all__ = [
    "CONVENTIONS",
    "CollapsedLayers",
    "Convention",
    "DeadUnits",
    "EffectiveDensity",
    "Energy",
    "EnergyMeter",
    "ExplorationRate",
    "FlopsMeter",
    "FlopsRow",
    "FlopsTable",
    "GradientNorms",
    "InDegreeHistogram",
    "LossSpikes",
    "MaskChurn",
    "MaskDensity",
    "MaskOverlap",
    "Memory",
    "NMConformance",
    "Operations",
    "PeakMemory",
    "TrainingFlops",
    "WeightOperations",
    "chain_effective_masks",
    "collapsed_layers",
    "count_operations",
    "dead_inputs",
    "dead_outputs",
    "effective_density",
    "effective_masks",
    "exploration_rate",
    "flops_table",
    "gradient_norms",
    "in_degree_histogram",
    "in_degrees",
    "inference_flops",
    "inference_ratio",
    "layer_macs",
    "loss_spikes",
    "mask_churn",
    "mask_density",
    "mask_overlap",
    "nm_conformance",
    "predict_memory",
    "rigl_training_flops",
    "static_training_flops",
    "training_ratio",
    "uncounted",
]


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        from dst.metrics import diagnostics

        return getattr(diagnostics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
