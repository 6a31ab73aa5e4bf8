"""The first mask: how many weights of each layer are active, and which."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.method import Method
from dst.pieces.allocation import planned_counts
from dst.pieces.protocols import Allocation, LayerView, as_sampler
from dst.topology.counts import count_active
from dst.topology.layers import SparseLayer, check_orientation
from dst.topology.mask_file import check_masks, load_masks
from dst.topology.seeding import folded_generator
from dst.topology.selection import top_indices


def layer_counts(
    method: Method,
    layers: Sequence[SparseLayer],
    density: float,
    scores: Sequence[Tensor] | None = None,
    allocation: Allocation | None = None,
) -> list[int] | None:
    """Split a budget over layers by the method's allocation and pattern.

    Args:
        method: The method.
        layers: All sparse layers.
        density: The density, in (0, 1], over the layers that can have the pattern; others stay dense.
        scores: One float tensor per layer, of its shape, for an allocation that needs them.
        allocation: Instead of the method's.

    Returns:
        Active weights per layer, or ``None`` if scores decide and there are none yet.

    Raises:
        ConfigurationError: The budget is infeasible.
    """
    if density == 1:
        return [layer.weights for layer in layers]
    if setting := method.needs_orientation:
        check_orientation(layers, setting)
    pattern, allocation = method.pattern.for_density(density), allocation or method.allocation
    free = [layer for layer in layers if pattern.unsupported_reason(layer) is None]
    if not free:
        reasons = "; ".join(f"{layer.label}: {pattern.unsupported_reason(layer)}" for layer in layers)
        raise ConfigurationError(f"no layer can have the pattern {type(method.pattern).__name__} ({reasons})")
    labels, shapes = [layer.label for layer in free], [layer.shape for layer in free]
    counts: list[int] | None
    if not pattern.is_free:
        counts = [0] * len(free)
    elif scores is not None:
        score_of = {layer.label: score for layer, score in zip(layers, scores, strict=True)}
        spread = [pattern.spread(layer, score_of[layer.label]) for layer in free]
        counts = allocation.counts(labels, shapes, density, spread)
    else:
        counts = planned_counts(allocation, labels, shapes, density)
    if counts is None:
        return None
    fitted = {layer.label: pattern.fit(layer, count) for layer, count in zip(free, counts, strict=True)}
    return [fitted.get(layer.label, layer.weights) for layer in layers]


def first_positions(
    method: Method,
    layers: Sequence[SparseLayer],
    view: Callable[[SparseLayer, torch.Generator], LayerView],
    *,
    seed: int,
    step: int = 0,
    density: float | None = None,
    prepared: Collection[str] = (),
    given: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[SparseLayer, int, Tensor | None]]:
    """Choose the first active weights of all layers, one layer at a time.

    Choices depend on (seed, step, layer) only, so all backends and all processes choose the same. A random draw takes memory
    in proportion to the active weights; other inits score every weight.

    Args:
        method: The method; its init is not ``FromFile``.
        layers: All sparse layers.
        view: Called with a layer and a generator where the layer is scored.
        seed: Seeds random choices.
        step: The optimizer step.
        density: The network's density; by default the method's.
        prepared: Labels of layers whose active weights ``dst.prepare`` has chosen.
        given: Layer label to scores, of inits that score the whole network.

    Yields:
        Layer, number of active weights, and their sorted row-major positions; ``None`` for a prepared layer.
    """
    init, sampler = method.init, as_sampler(method.init)

    def score(layer: SparseLayer) -> Tensor:
        if given is not None:
            return given[layer.label]
        return init.scores(view(layer, folded_generator(seed, "init", step, layer.label)))

    density = method.density if density is None else density
    pattern = method.pattern_at(density)
    allocation = method.first_allocation or method.allocation
    by_score = allocation.needs_scores and pattern.is_free and density < 1
    scores = [score(layer) for layer in layers] if by_score else None
    counts = layer_counts(method, layers, density, scores, allocation)
    assert counts is not None
    for i, (layer, count) in enumerate(zip(layers, counts, strict=True)):
        if layer.label in prepared:
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


def positions_in_file(
    method: Method, layers: Sequence[SparseLayer], path: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Read the first active weights of all layers from a mask file.

    Args:
        method: The method, whose density and pattern the masks must have.
        layers: All sparse layers.
        path: The file, written by ``dst.save_masks``.
        shapes: Name of every sparse parameter to its dense shape.

    Returns:
        Layer label to sorted positions, int64, on the CPU.

    Raises:
        ConfigurationError: Masks of another density or pattern.
        StateError: No such file, or one that does not fit the model.
    """
    masks = load_masks(path)
    check_masks(masks, shapes, f"mask file {path}")
    pattern, density = method.pattern_at(method.density), method.density
    kept = slack = 0
    found = {}
    for layer in layers:
        mask = layer.part(masks[layer.parameter])
        fits = pattern.unsupported_reason(layer) is None
        if fits and not pattern.holds(layer, mask) and not bool(mask.all()):
            raise ConfigurationError(
                f"the mask of {layer.label} in {path} does not have the pattern {type(method.pattern).__name__}"
            )
        slack += pattern.fit(layer, 1) if fits else layer.weights
        found[layer.label] = mask.reshape(-1).nonzero().squeeze(1)
        kept += found[layer.label].numel()
    total = sum(layer.weights for layer in layers)
    if abs(kept - density * total) > slack:
        raise ConfigurationError(
            f"the masks in {path} have density {kept / total:.6g}, the method {density:.6g}; "
            f"pass density={kept / total:.6g}"
        )
    return found


def masks_on_the_way(
    method: Method, layers: Sequence[SparseLayer], scores: Mapping[str, Tensor], progress: float, *, seed: int
) -> dict[str, Tensor]:
    """Masks between the dense network and the method's budget, for inits that prune iteratively.

    The network has density ``density ** progress``. If scores do not decide the split, each layer has its own final density
    to that power, so no layer's count ever rises.

    Args:
        method: The method.
        layers: All sparse layers.
        scores: Layer label to scores.
        progress: In [0, 1].
        seed: Breaks ties.

    Returns:
        Layer label to bool mask of its shape.
    """
    labels, shapes = [layer.label for layer in layers], [layer.shape for layer in layers]
    allocation = method.allocation
    if allocation.needs_scores:
        counts = allocation.counts(labels, shapes, method.density**progress, [scores[label] for label in labels])
    else:
        final = allocation.counts(labels, shapes, method.density)
        counts = [count_active(x.weights, (c / x.weights) ** progress) for x, c in zip(layers, final, strict=True)]
    masks = {}
    for layer, count in zip(layers, counts, strict=True):
        values = scores[layer.label].reshape(-1)
        ties = folded_generator(seed, "init ties on the way", repr(progress), layer.label)
        mask = torch.zeros_like(values, dtype=torch.bool)
        mask[top_indices(values, count, ties)] = True
        masks[layer.label] = mask.view(layer.shape)
    return masks
