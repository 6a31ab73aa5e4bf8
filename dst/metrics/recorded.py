"""Figures per layer that a run records: dead units, in-degrees, and connections per position of the input."""

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
"""A layer with at most this share of its units connected, or at most this density, is about to disconnect."""

_BINS = 24


@dataclass(frozen=True)
class DeadCounts:
    """Units without an active weight per layer, in the order of ``Sparsifier.layers``."""

    inputs: list[int]
    outputs: list[int]


def dead_units(sparsifier: Sparsifier) -> DeadCounts:
    """Count the inputs and outputs of every layer without an active weight.

    An input of a grouped convolution counts as dead if it is dead in every group. With sharded parameters this is a
    collective that all processes must enter.

    Args:
        sparsifier: The sparsifier that holds the masks.

    Returns:
        The counts; 0 for dense layers.
    """
    counts = []
    for layer, mask in whole_masks(sparsifier):
        counts += [dead_inputs(mask, layer.output_dim).sum(), dead_outputs(mask, layer.output_dim).sum()]
    flat = torch.stack([count.to(counts[0].device) for count in counts]).tolist()  # one transfer for all
    return DeadCounts(flat[::2], flat[1::2])


def is_disconnecting(layer: SparseLayer, dead: int, outputs: bool) -> bool:
    """Whether at most 5% of a layer's inputs or outputs, or one, still have an active weight.

    Args:
        layer: The layer.
        dead: Number of its dead inputs or outputs.
        outputs: Whether ``dead`` counts outputs.

    Returns:
        The answer; False for a single unit, which any active weight connects.
    """
    units = layer.shape[layer.output_dim if outputs else 1 - layer.output_dim]
    return units > 1 and units - dead <= max(1, LEAST_ACTIVE * units)


def degree_histogram(mask: Tensor, output_dim: int = 0, bins: int = _BINS) -> dict[str, Any]:
    """Histogram of the fan-in of the outputs, in bins of equal width.

    Args:
        mask: Bool tensor of shape (out, in, ...).
        output_dim: Dimension of the outputs.
        bins: Largest number of bins, at least 1.

    Returns:
        ``first``, the smallest fan-in; ``width`` of a bin, an int; ``counts`` of outputs per bin.
    """
    degrees = in_degrees(mask, output_dim)
    first = int(degrees.min())
    width = math.ceil((int(degrees.max()) - first + 1) / bins)
    return {"first": first, "width": width, "counts": torch.bincount((degrees - first) // width).tolist()}


def input_picture(layer: SparseLayer, mask: Tensor, input_shape: Sequence[int]) -> dict[str, Any] | None:
    """Number of active weights per position of the input, if the layer reads the input.

    Args:
        layer: The first sparse layer of the network.
        mask: Its mask.
        input_shape: Shape of one sample: (channels, height, width).

    Returns:
        ``kind``: "pixels" for a linear layer that reads all values, "kernel" for a convolution, whose kernel visits every
        pixel. ``counts``: rows of ints, summed over channels. None for a layer that does not read the input.
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
    """Yield each layer with its whole mask. With sharded parameters this is a collective."""
    masks = sparsifier.masks
    for layer in sparsifier.layers:
        yield layer, layer.part(whole(masks[layer.parameter]))
