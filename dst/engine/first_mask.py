"""Choosing the first mask: from a file or by scores, beside the layers that ``dst.prepare`` has chosen for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from dst.backends.storages import Storages
from dst.engine.saved_state import check_prepared
from dst.errors import ConfigurationError
from dst.method import Method
from dst.pieces.init import FromFile
from dst.planning.first_mask import first_positions, positions_in_file
from dst.topology.layers import SparseLayer


def choose_first_mask(
    method: Method,
    layers: Sequence[SparseLayer],
    storages: Storages,
    *,
    seed: int,
    step: int,
    total_steps: int,
    given: Mapping[str, Tensor] | None,
    unsupported: Mapping[str, str | None],
) -> dict[str, Tensor]:
    """Choose the first active weights of all layers and change nothing.

    Args:
        method: The method.
        layers: All sparse layers.
        storages: Their storages.
        seed: Seeds random choices.
        step: The optimizer step.
        total_steps: Steps of the whole training.
        given: Layer label to scores, of inits that score the network as a whole.
        unsupported: Layer label to why the method's backend cannot store it, or ``None`` where it can.

    Returns:
        Layer label to sorted positions. Layers that were prepared may be left out.

    Raises:
        ConfigurationError: A layer that should have been prepared, or one that was prepared with another budget.
        StateError: A mask file that does not fit the model.
    """
    if isinstance(method.init, FromFile):
        shapes = {name: storages.shape(name) for name in storages.parameters}
        found = positions_in_file(method, layers, method.init.path, shapes)
        kept = {layer.parameter: found[layer.label] for layer in layers if storages.is_prepared(layer.parameter)}
        check_prepared(kept, f"mask file {method.init.path}", storages)
        chosen: list[tuple[SparseLayer, int, Tensor | None]] = [
            (layer, found[layer.label].numel(), found[layer.label]) for layer in layers
        ]
    else:
        needs_gradient = method.init.needs_gradient
        prepared = [layer.label for layer in layers if storages.is_prepared(layer.parameter)]
        chosen = list(
            first_positions(
                method,
                layers,
                lambda layer, generator: storages.view(layer, generator, gradient=needs_gradient),
                seed=seed,
                step=step,
                density=method.density_at(step, total_steps),
                prepared=prepared,
                given=given,
            )
        )
    for layer, count, _ in chosen:
        if not storages.is_prepared(layer.parameter):
            _check_storage(method, layer, count, unsupported)
        elif not method.allocation.needs_scores and count != storages.active(layer):
            raise ConfigurationError(
                f"{layer.parameter} was prepared with {storages.active(layer)} connections, and the method gives it "
                f"{count}: pass the same method, include and exclude to dst.prepare"
            )
    return {layer.label: positions for layer, _, positions in chosen if positions is not None}


def _check_storage(method: Method, layer: SparseLayer, count: int, unsupported: Mapping[str, str | None]) -> None:
    """Refuse to train masked what should have been prepared."""
    if count < layer.weights and unsupported.get(layer.label, "") is None:
        raise ConfigurationError(
            f'{layer.parameter} has ordinary weights, and the method has backend="{method.backend}": call '
            "model = dst.prepare(model, method) before the optimizer is built, with the same include and exclude"
        )
