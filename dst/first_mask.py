"""The first mask: how many connections every layer gets, and which."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from dst.layers import SparseLayer
from dst.method import Method
from dst.topology import top_indices
from dst.types import LayerView, as_sampler, folded_generator


def first_positions(
    method: Method,
    layers: Sequence[SparseLayer],
    view: Callable[[SparseLayer, torch.Generator], LayerView],
    *,
    seed: int,
    step: int = 0,
    placed: Collection[str] = (),
) -> Iterator[tuple[SparseLayer, int, Tensor | None]]:
    """Choose the first connections of all layers, one layer at a time.

    Choices depend on (seed, step, layer) alone, so that all backends and all processes make the same ones. Connections
    that are drawn at random take memory in proportion to their number; others are chosen by a score for every weight.

    Args:
        method: Says how the budget is split and what the connections are chosen by; not for ``init=FromFile``.
        layers: All sparse layers.
        view: Called with a layer and a generator where the layer is scored.
        seed: Seeds random choices.
        step: The optimizer step.
        placed: Labels of layers whose connections exist already.

    Yields:
        Layer, number of connections, and their sorted row-major positions; ``None`` for a layer that is placed.
    """
    init, sampler = method.init, as_sampler(method.init)

    def score(layer: SparseLayer) -> Tensor:
        return init.scores(view(layer, folded_generator(seed, "init", step, layer.label)))

    scores = [score(layer) for layer in layers] if method.allocation.needs_scores else None
    labels, shapes = [layer.label for layer in layers], [layer.shape for layer in layers]
    counts = method.allocation.counts(labels, shapes, method.density, scores)
    for i, (layer, count) in enumerate(zip(layers, counts, strict=True)):
        if layer.label in placed:
            yield layer, count, None
        elif sampler is not None:
            nothing = torch.empty(0, dtype=torch.int64)
            generator = folded_generator(seed, "init", step, layer.label)
            yield layer, count, sampler.sample(layer.weights, nothing, count, generator)
        else:
            values = (scores[i] if scores is not None else score(layer)).reshape(-1)
            ties = folded_generator(seed, "init ties", step, layer.label)
            yield layer, count, top_indices(values, count, ties)
