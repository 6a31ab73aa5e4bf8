"""Figures of a run's layers that its recording holds: dead units, in-degrees, and connections by place of the input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dst.engine.sparsifier import Sparsifier
from dst.metrics.health import dead_inputs, dead_outputs
from dst.metrics.topology import in_degrees
from dst.topology.layers import SparseLayer
from dst.topology.sharding import whole

LEAST_ACTIVE = 0.05
"""Share of a layer's units, or of its density, at or below which the layer is about to disconnect."""

_BINS = 24


@dataclass(frozen=True)
class DeadCounts:
    """Units without connections, by layer in the order of ``Sparsifier.layers``."""

    inputs: list[int]
    outputs: list[int]


def dead_units(sparsifier: Sparsifier) -> DeadCounts:
    """Count each layer's inputs and outputs that no connection touches.

    Of a grouped convolution, an input counts as dead if it is in every group. Where parameters are spread over processes
    this is a collective.

    Args:
        sparsifier: Whose masks to look at.

    Returns:
        The counts; 0 for layers that are dense.
    """
    counts = []
    for layer, mask in whole_masks(sparsifier):
        counts += [dead_inputs(mask, layer.output_dim).sum(), dead_outputs(mask, layer.output_dim).sum()]
    flat = torch.stack([count.to(counts[0].device) for count in counts]).tolist()  # one transfer for all
    return DeadCounts(flat[::2], flat[1::2])


def is_disconnecting(layer: SparseLayer, dead: int, outputs: bool) -> bool:
    """Whether so few of a layer's inputs or outputs are alive (5%, or one) that it is about to pass nothing.

    Args:
        layer: The layer.
        dead: Its dead inputs or outputs.
        outputs: Which of them.

    Returns:
        The answer; False where there is one unit, which a layer with any connection keeps alive.
    """
    units = layer.shape[layer.output_dim if outputs else 1 - layer.output_dim]
    return units > 1 and units - dead <= max(1, LEAST_ACTIVE * units)


def degree_histogram(mask: Tensor, output_dim: int = 0, bins: int = _BINS) -> dict[str, Any]:
    """How many outputs have how many incoming connections, in bins of equal width.

    Args:
        mask: Bool tensor of shape (out, in, ...).
        output_dim: Dimension of the outputs.
        bins: Most bins wanted, at least 1.

    Returns:
        ``first``, the least degree; ``width`` of a bin, an int; ``counts`` of outputs, from the first bin on.
    """
    degrees = in_degrees(mask, output_dim)
    first = int(degrees.min())
    width = math.ceil((int(degrees.max()) - first + 1) / bins)
    return {"first": first, "width": width, "counts": torch.bincount((degrees - first) // width).tolist()}


def input_picture(layer: SparseLayer, mask: Tensor, input_shape: Sequence[int]) -> dict[str, Any] | None:
    """How many connections each place of the input has, if the layer reads the input.

    Args:
        layer: The network's first sparse layer.
        mask: Its mask.
        input_shape: Of one sample: (channels, height, width).

    Returns:
        ``kind``, "pixels" for a linear layer that reads all values, "kernel" for a convolution (whose kernel visits every
        pixel); and ``counts``, rows of ints, channels summed. None for a layer that reads something else.
    """
    if len(input_shape) != 3:
        return None
    channels, height, width = input_shape
    if mask.ndim == 2 and mask.shape[1] == channels * height * width:
        counts = mask.sum(0).unflatten(0, (channels, height, width)).sum(0)
        return {"kind": "pixels", "counts": counts.tolist()}
    if mask.ndim == 4 and layer.output_dim == 0 and mask.shape[1] == channels:
        return {"kind": "kernel", "counts": mask.sum((0, 1)).tolist()}
    return None


def whole_masks(sparsifier: Sparsifier) -> Iterator[tuple[SparseLayer, Tensor]]:
    """Each layer with its whole mask; a collective where parameters are spread over processes."""
    masks = sparsifier.masks
    for layer in sparsifier.layers:
        yield layer, layer.part(whole(masks[layer.parameter]))
