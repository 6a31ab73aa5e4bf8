"""The first mask: how many connections every layer gets, and which."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from dst.allocation import planned_counts
from dst.errors import ConfigurationError
from dst.layers import SparseLayer
from dst.method import Method
from dst.patterns import Unstructured
from dst.topology import top_indices
from dst.types import Allocation, LayerView, as_sampler, folded_generator


def layer_counts(
    method: Method,
    layers: Sequence[SparseLayer],
    density: float,
    scores: Sequence[Tensor] | None = None,
    allocation: Allocation | None = None,
) -> list[int] | None:
    """Split a budget over layers, as the method's allocation and pattern have it.

    Args:
        method: Says how.
        layers: All sparse layers.
        density: The network's density, in (0, 1].
        scores: One float tensor per layer, of its shape, for an allocation that needs them.
        allocation: Instead of the method's.

    Returns:
        Active weights per layer, or ``None`` where scores decide and there are none yet.

    Raises:
        ConfigurationError: A budget that cannot hold.
    """
    if density == 1:
        return [layer.weights for layer in layers]
    pattern, allocation = method.pattern.for_density(density), allocation or method.allocation
    free = [layer for layer in layers if pattern.obstacle(layer) is None]
    if not free:
        reasons = "; ".join(f"{layer.label}: {pattern.obstacle(layer)}" for layer in layers)
        raise ConfigurationError(f"no layer can have the pattern {type(method.pattern).__name__} ({reasons})")
    labels, shapes = [layer.label for layer in layers], [layer.shape for layer in layers]
    counts: list[int] | None
    if not pattern.is_free:
        counts = [0] * len(layers)
    elif scores is not None:
        spread = [pattern.spread(layer, score) for layer, score in zip(layers, scores, strict=True)]
        counts = allocation.counts(labels, shapes, density, spread)
    else:
        counts = planned_counts(allocation, labels, shapes, density)
    if counts is None:
        return None
    return [
        layer.weights if pattern.obstacle(layer) else pattern.fit(layer, count)
        for layer, count in zip(layers, counts, strict=True)
    ]


def first_positions(
    method: Method,
    layers: Sequence[SparseLayer],
    view: Callable[[SparseLayer, torch.Generator], LayerView],
    *,
    seed: int,
    step: int = 0,
    density: float | None = None,
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
        density: The network's density; by default the method's.
        placed: Labels of layers whose connections exist already.

    Yields:
        Layer, number of connections, and their sorted row-major positions; ``None`` for a layer that is placed.
    """
    init, sampler = method.init, as_sampler(method.init)

    def score(layer: SparseLayer) -> Tensor:
        return init.scores(view(layer, folded_generator(seed, "init", step, layer.label)))

    density = method.density if density is None else density
    pattern = method.pattern.for_density(density) if density < 1 else Unstructured()
    allocation = method.first_allocation or method.allocation
    by_score = allocation.needs_scores and pattern.is_free and density < 1
    scores = [score(layer) for layer in layers] if by_score else None
    counts = layer_counts(method, layers, density, scores, allocation)
    assert counts is not None
    for i, (layer, count) in enumerate(zip(layers, counts, strict=True)):
        if layer.label in placed:
            yield layer, count, None
        elif pattern.is_grouped and count < layer.weights:
            ties = folded_generator(seed, "init ties", step, layer.label)
            yield layer, count, pattern.select(layer, scores[i] if scores is not None else score(layer), count, ties)
        elif sampler is not None:
            nothing = torch.empty(0, dtype=torch.int64)
            generator = folded_generator(seed, "init", step, layer.label)
            yield layer, count, sampler.sample(layer.weights, nothing, count, generator)
        else:
            values = (scores[i] if scores is not None else score(layer)).reshape(-1)
            ties = folded_generator(seed, "init ties", step, layer.label)
            yield layer, count, top_indices(values, count, ties)
