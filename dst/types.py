"""Protocols of a method's pieces, for pieces of your own.

- `Allocation`: the densities of layers. `Init`, `LossInit`, `CallInit`: first masks.
- `Score`: drop scores and grow scores. `Observer`: scores that see every step. `ActiveScore`, `AfterDropScore`: scores of
  active weights alone, and of the mask after the drop. `Sampler`: scores and inits that draw positions.
- `Clock`, `Fraction`, `DensitySchedule`: schedules. `Duration`: a number of steps or a fraction of training.
- `Amount`: drop counts. `Redistribution`: moving budget between layers.
- `Pattern`: groups and scopes. `Perturbation`: additions to gradients of active weights.
- `LayerView`, `LayerStat`: what pieces see of a layer.
"""

from dst.pieces.durations import Duration, check_duration, resolve_steps
from dst.pieces.protocols import (
    ActiveScore,
    AfterDropScore,
    Allocation,
    Amount,
    CallInit,
    Clock,
    DensitySchedule,
    Fraction,
    Init,
    LayerStat,
    LayerView,
    LossInit,
    Observer,
    Pattern,
    Perturbation,
    Redistribution,
    Sampler,
    Score,
    as_sampler,
    waits_for_batch,
)

__all__ = [
    "ActiveScore",
    "AfterDropScore",
    "Allocation",
    "Amount",
    "CallInit",
    "Clock",
    "DensitySchedule",
    "Duration",
    "Fraction",
    "Init",
    "LayerStat",
    "LayerView",
    "LossInit",
    "Observer",
    "Pattern",
    "Perturbation",
    "Redistribution",
    "Sampler",
    "Score",
    "as_sampler",
    "check_duration",
    "resolve_steps",
    "waits_for_batch",
]
