"""Chains of linear layers: paths, and connections that lie on no path from an input to an output."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from dst.topology.layers import SparseLayer


def sequences(layers: Sequence[SparseLayer]) -> list[list[SparseLayer]]:
    """Split layers into chains in which the outputs of each layer are the inputs of the next.

    Layers are assumed to run in the model's order, and two layers to be connected if their sizes fit. This holds for
    ordinary stacks of linear layers. A layer with other than two dimensions ends a chain.

    Args:
        layers: Sparse layers in the model's order.

    Returns:
        Chains of at least two layers.
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
    """Number of outputs of a layer."""
    return layer.shape[layer.output_dim]


def incomplete(masks: Sequence[Tensor]) -> list[Tensor]:
    """Active connections that lie on no path from an input to an output.

    These are connections into hidden neurons without outputs and out of hidden neurons without inputs. Removing one can
    make others incomplete, so the search repeats until it finds none ("chain removal"; Zhang et al. 2024,
    https://arxiv.org/abs/2501.19107).

    Args:
        masks: Bool ``[outputs, inputs]`` of consecutive layers.

    Returns:
        Bool per layer, True at active connections that are incomplete.
    """
    kept = [mask.clone() for mask in masks]
    while True:
        changed = False
        for before, after in pairwise(kept):
            useless = ~(before.any(1) & after.any(0))  # hidden neurons without an input or an output
            if bool(before[useless].any()) or bool(after[:, useless].any()):
                before[useless] = False
                after[:, useless] = False
                changed = True
        if not changed:
            return [mask & ~left for mask, left in zip(masks, kept, strict=True)]
