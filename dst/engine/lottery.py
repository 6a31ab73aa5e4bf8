"""Lottery tickets: densities of the levels, pruning and rewinding between them, as pure functions.

Level 0 is dense. After each level a share of the remaining weights is pruned, and the next level is a fresh fit from a
snapshot that level 0 took at step k, or from the trained weights with the learning rates of step k.
``dst.lightning.lottery_levels`` runs the levels with Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dst.pieces.protocols import Allocation
from dst.topology.layers import SparseLayer
from dst.topology.seeding import folded_generator
from dst.topology.selection import select_top


def level_densities(density: float, prune_fraction: float | None = 0.2) -> list[float]:
    """Densities of all levels, the dense one first.

    Level n keeps ``(1 - prune_fraction)**n`` of the weights; the last level is the first that would fall to ``density``
    or below, and has exactly ``density``.

    Args:
        density: Density of the last level, in (0, 1].
        prune_fraction: Share of the remaining weights removed after each level, in (0, 1); ``None`` for a single pruning,
            straight to ``density``.

    Returns:
        Strictly decreasing densities from 1.0 to ``density``.
    """
    densities = [1.0]
    if prune_fraction is None:
        return densities if density == 1 else [1.0, density]
    while densities[-1] > density:
        following = (1 - prune_fraction) ** len(densities)
        # A power that equals the density up to rounding is the last level.
        densities.append(density if following <= density or math.isclose(following, density) else following)
    return densities


def prune(
    layers: Sequence[SparseLayer],
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    density: float,
    allocation: Allocation,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The next level's masks: the largest of the remaining weights (Frankle & Carbin 2019, iterative pruning).

    Args:
        layers: The sparse layers, from ``dst.topology.layers.find_layers``.
        weights: Parameter name to trained weight.
        masks: Parameter name to the level's mask (bool, of the weight's shape).
        density: The next level's density, below the level's.
        allocation: How the budget is split; ``Global()`` for the published method.
        seed: Breaks ties.

    Returns:
        Parameter name to bool mask; a subset of ``masks``.

    Raises:
        ValueError: The allocation wants more of a layer than this level has left.
    """
    scores = []
    for layer in layers:
        magnitude = layer.part(weights[layer.parameter]).detach().abs()
        # Pruned weights rank below every remaining one, zeros included.
        scores.append(magnitude.masked_fill(~layer.part(masks[layer.parameter]), -1.0))
    counts = allocation.counts([x.label for x in layers], [x.shape for x in layers], density, scores)
    following = {name: mask.clone() for name, mask in masks.items()}
    for layer, score, count in zip(layers, scores, counts, strict=True):
        remaining = layer.part(masks[layer.parameter])
        generator = folded_generator(seed, "lottery", repr(density), layer.label)
        layer.part(following[layer.parameter]).copy_(select_top(score, count, remaining, generator))
    return following


@torch.no_grad()
def rewind(model: nn.Module, snapshot: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Load a snapshot into a model and set the weights outside ``masks`` to zero.

    Args:
        model: The model.
        snapshot: What ``model.state_dict()`` was at step k of the dense level; for learning-rate rewinding and
            fine-tuning, what it is now.
        masks: Parameter name to bool mask.
    """
    model.load_state_dict(dict(snapshot))
    for name, parameter in model.named_parameters():
        if name in masks:
            parameter.masked_fill_(~masks[name].to(parameter.device), 0)


def rewind_rates(trained: Mapping[str, Any], snapshot: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state for learning-rate rewinding (Renda et al. 2020, section 2).

    Args:
        trained: Its ``state_dict()`` at the end of a level.
        snapshot: Its ``state_dict()`` at step k of the dense level.

    Returns:
        The per-weight state of ``trained``, which belongs to the weights that stay, with the learning rates and other
        settings of ``snapshot``, which belong to the schedule that goes back.
    """
    return {**trained, "param_groups": snapshot["param_groups"]}
