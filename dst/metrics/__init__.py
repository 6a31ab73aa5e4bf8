"""Measures the costs and the topology of sparse networks: pure functions, and torchmetrics classes built on them.

The classes are imported on first use, so that the functions need torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dst.errors import missing_package
from dst.metrics.conventions import CONVENTIONS, Convention
from dst.metrics.counting import Operations, WeightOperations, count_operations, layer_macs
from dst.metrics.energy import Energy, EnergyMeter
from dst.metrics.flops import (
    FlopsRow,
    FlopsTable,
    flops_table,
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
        InDegreeHistogram,
        MaskChurn,
        MaskDensity,
        MaskOverlap,
        NMConformance,
    )
    from dst.metrics.training_diagnostics import GradientNorms, LossSpikes

_CLASSES = {
    "CollapsedLayers": "dst.metrics.diagnostics",
    "DeadUnits": "dst.metrics.diagnostics",
    "EffectiveDensity": "dst.metrics.diagnostics",
    "ExplorationRate": "dst.metrics.diagnostics",
    "GradientNorms": "dst.metrics.training_diagnostics",
    "InDegreeHistogram": "dst.metrics.diagnostics",
    "LossSpikes": "dst.metrics.training_diagnostics",
    "MaskChurn": "dst.metrics.diagnostics",
    "MaskDensity": "dst.metrics.diagnostics",
    "MaskOverlap": "dst.metrics.diagnostics",
    "NMConformance": "dst.metrics.diagnostics",
}
"""Class name -> the module that defines it."""

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
    "layer_macs",
    "loss_spikes",
    "mask_churn",
    "mask_density",
    "mask_overlap",
    "nm_conformance",
    "predict_memory",
]


def __getattr__(name: str) -> Any:
    """Import a class on first use."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_CLASSES[name]), name)
    except ModuleNotFoundError as error:
        raise missing_package(f"dst.metrics.{name}", error) from error
