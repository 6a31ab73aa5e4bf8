"""Swapping layers for ones that store only non-zeros, with their first mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dst.backends.csr_support import owners_of, unsupported_reasons
from dst.backends.swap import exchange, sparse_module
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
    swapped: dict[nn.Module, nn.Module] = {}
    for layer, positions in _first(model, layers, method, seed, modules):
        if positions is None:
            continue
        if positions.numel() == layer.weights:
            keep(layer, "dense", "keeps all its weights")
            continue
        if (reason := unsupported[layer.label]) is not None:
            keep(layer, "masked", reason)
            continue
        dense = owners[layer.parameter][0]
        if choose(layer, dense, positions.numel()):
            swapped[dense] = sparse_module(layer.label, dense, positions, seed)
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
        whole = {x.parameter: x.shape if x.parameter in modules else tuple(named[x.parameter].shape) for x in layers}
        found = positions_in_file(method, layers, method.init.path, whole)
        for layer in layers:
            yield layer, None if layer.parameter in modules else found[layer.label]
        return

    def view(layer: SparseLayer, generator: torch.Generator) -> LayerView:
        if layer.parameter in modules:
            weight = modules[layer.parameter].dense_weight()
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
