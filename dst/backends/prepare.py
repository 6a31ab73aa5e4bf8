"""Swapping layers for ones that store only non-zeros, with their first mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dst.backends.csr_support import owners_of
from dst.backends.decision import Choose, Decision, decide
from dst.backends.swap import exchange, sparse_attention, sparse_module, sparse_recurrent
from dst.errors import ConfigurationError
from dst.method import Method
from dst.nn import SparseLinear
from dst.pieces.init import FromFile
from dst.pieces.protocols import LayerView
from dst.planning.first_mask import first_positions, positions_in_file
from dst.topology.layers import SparseLayer, find_layers, sparse_modules


def prepare(
    model: nn.Module,
    method: Method,
    *,
    seed: int,
    include: Iterable[str | type[nn.Module]] | None,
    exclude: Iterable[str | type[nn.Module]] | None,
    choose: Choose | None = None,
    report: Callable[[Mapping[str, Decision]], None] = lambda decisions: None,
) -> nn.Module:
    """Swap layers for ones that store only non-zeros, with their first mask; see ``dst.prepare``.

    Args:
        model: The model.
        method: The method.
        seed: Seed of the first mask.
        include: See ``dst.prepare``.
        exclude: See ``dst.prepare``.
        choose: Decides which of the supported layers to swap; all of them by default. See ``decide``.
        report: Called with the decision of each layer that was not sparse before.
    """
    if any(m.pattern_seed is not None for m in model.modules() if isinstance(m, SparseLinear)):
        return model  # already prepared
    layers, _ = find_layers(model, include, exclude)
    first = {x.label: found for x, found in _first(model, layers, method, seed, sparse_modules(model))}
    active = [None if (found := first[x.label]) is None else found.numel() for x in layers]
    decisions = decide(model, layers, active, choose)
    report({label: decision for label, decision in decisions.items() if first[label] is not None})
    owners, swapped = owners_of(model), dict[nn.Module, nn.Module]()
    recurrent: dict[nn.Module, dict[str, SparseLinear]] = {}
    parts: dict[str, list[SparseLayer]] = {}
    for layer in layers:
        parts.setdefault(layer.parameter, []).append(layer)
    for held in parts.values():
        # Positions are freed as they are used.
        positions = [None if (found := first.pop(x.label)) is None else found + x.offset for x in held]
        known = [found for found in positions if found is not None]
        if known and any(decisions[x.label].storage == "csr" for x in held):
            dense, name = owners[held[0].parameter][0], held[0].parameter
            sparse = sparse_module(name, dense, torch.cat(known), seed)
            if isinstance(dense, nn.RNNBase):
                recurrent.setdefault(dense, {})[name.rpartition(".")[2]] = sparse
            else:
                swapped[dense] = sparse
    swapped.update({dense: sparse_recurrent(dense, weights, seed) for dense, weights in recurrent.items()})
    for attention in [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]:
        if attention in swapped:
            packed, output = swapped[attention], attention.out_proj
            assert isinstance(packed, SparseLinear)
            swapped[attention] = sparse_attention(attention, packed, swapped.get(output, output))
    return exchange(model, swapped)


def _first(
    model: nn.Module,
    layers: Sequence[SparseLayer],
    method: Method,
    seed: int,
    modules: Mapping[str, SparseLinear],
) -> Iterable[tuple[SparseLayer, Tensor | None]]:
    """Layers and their first positions; ``None`` for sparse modules."""
    named = dict(model.named_parameters())
    if isinstance(method.init, FromFile):
        stored = {name: module.shape for name, module in modules.items()}
        whole = {x.parameter: stored.get(x.parameter) or tuple(named[x.parameter].shape) for x in layers}
        found = positions_in_file(method, layers, method.init.path, whole)
        for layer in layers:
            yield layer, None if layer.parameter in modules else found[layer.label]
        return

    def view(layer: SparseLayer, generator: torch.Generator) -> LayerView:
        if layer.parameter in modules:
            weight = layer.part(modules[layer.parameter].dense_weight())
        elif named[layer.parameter].device.type == "meta":
            raise ConfigurationError(
                f"{layer.parameter} is on the meta device, and {type(method.init).__name__} with this allocation needs its "
                "values: call model.to_empty first, or draw the first mask at random with ERK"
            )
        else:
            weight = layer.part(named[layer.parameter].detach())
        return LayerView(weight, torch.ones_like(weight, dtype=torch.bool), None, None, generator)

    prepared = [layer.label for layer in layers if layer.parameter in modules]
    for layer, _, positions in first_positions(method, layers, view, seed=seed, prepared=prepared):
        yield layer, positions
