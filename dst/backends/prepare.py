"""Swapping layers for ones that store only non-zeros, with their first mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dst.backends.csr_support import owners_of, unsupported_reasons
from dst.backends.swap import exchange, sparse_attention, sparse_module
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
    choose: Callable[[SparseLayer, nn.Module, int], bool] = lambda layer, module, active: True,
    keep: Callable[[SparseLayer, str, str], None] = lambda layer, storage, reason: None,
) -> nn.Module:
    """Swap layers for ones that store only non-zeros, with their first mask; see ``dst.prepare``.

    Args:
        model: The model.
        method: The method.
        seed: Seed of the first mask.
        include: See ``dst.prepare``.
        exclude: See ``dst.prepare``.
        choose: Called with each supported layer, its dense module and its number of active weights. Returns whether to
            swap it.
        keep: Called with each other sparse layer, ``"masked"`` or ``"dense"``, and the reason.
    """
    if any(m.pattern_seed is not None for m in model.modules() if isinstance(m, SparseLinear)):
        return model  # already prepared
    layers, _ = find_layers(model, include, exclude)
    owners, modules = owners_of(model), sparse_modules(model)
    unsupported = unsupported_reasons(model, layers)
    attentions = {m.out_proj: m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    swapped: dict[nn.Module, nn.Module] = {}
    parts: dict[nn.Module, list[tuple[SparseLayer, Tensor]]] = {}
    for layer, positions in _first(model, layers, method, seed, modules):
        if positions is None:
            continue
        dense = owners[layer.parameter][0]
        if isinstance(dense, nn.MultiheadAttention) and unsupported[layer.label] is None:
            parts.setdefault(dense, []).append((layer, positions))
            if len(parts[dense]) == 3 and (projection := _packed(dense, parts[dense], seed, choose, keep)) is not None:
                swapped[dense] = projection
            continue
        if positions.numel() == layer.weights:
            keep(layer, "dense", "keeps all its weights")
            continue
        if (reason := unsupported[layer.label]) is not None:
            keep(layer, "masked", reason)
            continue
        if dense in attentions and attentions[dense] not in swapped:
            keep(layer, "masked", "q, k and v are not sparse")
        elif choose(layer, dense, positions.numel()):
            swapped[dense] = sparse_module(layer.label, dense, positions, seed)
    for output, attention in attentions.items():
        if attention in swapped:
            packed = swapped[attention]
            assert isinstance(packed, SparseLinear)
            swapped[attention] = sparse_attention(attention, packed, swapped.get(output, output))
    return exchange(model, swapped)


def _packed(
    attention: nn.MultiheadAttention,
    parts: Sequence[tuple[SparseLayer, Tensor]],
    seed: int,
    choose: Callable[[SparseLayer, nn.Module, int], bool],
    keep: Callable[[SparseLayer, str, str], None],
) -> SparseLinear | None:
    """The q, k and v projections of attention, unless they keep all weights or one of them is not chosen."""
    sparse = [(layer, positions) for layer, positions in parts if positions.numel() < layer.weights]
    for layer, positions in parts:
        if positions.numel() == layer.weights:
            keep(layer, "dense", "keeps all its weights")
    chosen = [choose(layer, attention, positions.numel()) for layer, positions in sparse]
    if not sparse or not all(chosen):
        for (layer, _), fast in zip(sparse, chosen, strict=True):
            if fast:
                keep(layer, "masked", "stored with q, k and v, of which not all are faster")
        return None
    name, positions = parts[0][0].parameter, torch.cat([positions + layer.offset for layer, positions in parts])
    return sparse_module(name, attention, positions, seed)


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
