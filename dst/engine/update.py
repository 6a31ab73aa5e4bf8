"""Carrying out a planned update: every layer selects, then every layer applies."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer

from dst.backends.storage import Scoring
from dst.backends.storages import Storages
from dst.planning.update import UpdatePlan
from dst.topology.layers import SparseLayer
from dst.topology.rewiring import Rewiring


def apply_plan(
    plan: UpdatePlan, storages: Storages, optimizer: Optimizer, scoring: Callable[[SparseLayer], Scoring]
) -> dict[str, Rewiring]:
    """Select what every layer of a plan drops and grows, then change weights, masks and optimizer state.

    Args:
        plan: How many weights each layer drops and grows.
        storages: The layers' storages.
        optimizer: The optimizer that holds the layers.
        scoring: A layer to what its weights are scored with.

    Returns:
        Layer label to what was dropped and grown. A layer whose gradient is missing is left out and stays as it is.
    """
    selected = [(update.layer, storages.decide(update, scoring(update.layer))) for update in plan.layers]
    made = [(layer, rewiring) for layer, rewiring in selected if rewiring is not None]
    for layer, rewiring in made:
        storages.apply(layer, rewiring, optimizer)
    return {layer.label: rewiring for layer, rewiring in made}
