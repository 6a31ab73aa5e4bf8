"""Which weights of a model were not counted."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def uncounted(model: nn.Module, macs: Mapping[str, int]) -> list[str]:
    """Names of the parameters with two or more dimensions that are missing in the result of `layer_macs`."""
    return [name for name, p in model.named_parameters() if p.ndim >= 2 and name not in macs]
