"""Chains of linear layers: connections that lie on no path from an input to an output."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dst.topology.layers import SparseLayer


def sequences(layers: Sequence[SparseLayer]) -> list[list[SparseLayer]]:
    """Split layers into runs in which each one's outputs are the next one's inputs.

    The model's order stands for the order of computation, and equal sizes for a connection: right for the usual stacks
    of linear layers; layers with other than two dimensions belong to no run.

    Args:
        layers: Sparse layers in the model's order.

    Returns:
        Runs of at least two layers.
    """
    runs: list[list[SparseLayer]] = []
    for layer in layers:
        if len(layer.shape) != 2:
            runs.append([])
        elif runs and runs[-1] and outputs_of(runs[-1][-1]) == layer.shape[1 - layer.output_dim]:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return [run for run in runs if len(run) > 1]


def outputs_of(layer: SparseLayer) -> int:
    """Number of outputs."""
    return layer.shape[layer.output_dim]


def incomplete(masks: Sequence[Tensor]) -> list[Tensor]:
    """Connections into hidden neurons that lead nowhere, and out of hidden neurons that nothing reaches.

    Removing some can make others incomplete, so the search repeats until there are none ("chain removal"; Zhang et al.
    2024, https://arxiv.org/abs/2501.19107).

    Args:
        masks: Bool ``[outputs, inputs]`` of consecutive layers.

    Returns:
        Bool per layer, True at active connections that are incomplete.
    """
    kept = [mask.clone() for mask in masks]
    while True:
        changed = False
        for before, after in pairwise(kept):
            useless = ~(before.any(1) & after.any(0))  # neurons between the two
            if bool(before[useless].any()) or bool(after[:, useless].any()):
                before[useless] = False
                after[:, useless] = False
                changed = True
        if not changed:
            return [mask & ~left for mask, left in zip(masks, kept, strict=True)]


def path_count(masks: Sequence[Tensor]) -> Tensor:
    """Number of paths from inputs to outputs, a scalar of dtype float64."""
    paths = torch.ones(masks[0].shape[1], dtype=torch.float64, device=masks[0].device)
    for mask in masks:
        paths = mask.to(torch.float64) @ paths
    return paths.sum()
