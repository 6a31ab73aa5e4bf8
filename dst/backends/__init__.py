"""Backends: how weights are stored. One module per backend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from dst.backends import auto
from dst.backends.convert import dense_optimizer_state, dense_state_dict, sparse_optimizer_state, to_dense
from dst.backends.csr import Csr
from dst.backends.latent import Latent
from dst.backends.masked import Masked
from dst.backends.prepare import prepare as prepare_csr
from dst.backends.storage import Scoring, Storage
from dst.backends.storages import Storages
from dst.errors import ConfigurationError
from dst.method import Method, check_method
from dst.pieces.protocols import as_sampler
from dst.topology.layers import Selector, SparseLayer, sparse_modules

__all__ = [
    "Csr",
    "Latent",
    "Masked",
    "Scoring",
    "Storage",
    "Storages",
    "dense_optimizer_state",
    "dense_state_dict",
    "open_storages",
    "prepare",
    "sparse_optimizer_state",
    "to_dense",
]


def prepare(
    model: nn.Module,
    method: Method,
    *,
    seed: int = 0,
    include: Iterable[Selector] | None = None,
    exclude: Iterable[Selector] | None = None,
    batch_size: int | None = None,
    example: Any = None,
    state: Mapping[str, Any] | None = None,
    process_group: ProcessGroup | None = None,
) -> nn.Module:
    """Swap modules for ones that store only non-zeros, if the method's backend uses them.

    Call it before building the optimizer. With the masked backend it returns the model unchanged. The Lightning callback
    calls it automatically.

    With ``backend="csr"`` every sparse ``nn.Linear`` becomes a ``dst.nn.SparseLinear``, and every sparse 1×1 convolution a
    ``dst.nn.SparseConv2d``, with the first mask of the method. The masked backend chooses the same mask for the same seed.
    Other sparse layers stay masked, and layers that keep all their weights stay dense; ``dst.plan`` lists them. A prepared
    model is returned unchanged. Linear layers may be on the meta device if the first mask is random. The dense weight is
    then never allocated, and values are drawn with the fan-in of the sparse layer.

    With ``backend="auto"`` only the layers whose forward and backward pass is faster with csr are swapped. A short
    measurement decides, on rank 0, and one line per layer logs the decision and its reason. A method that needs inactive
    weights stays masked.

    Args:
        model: The model.
        method: The method that trains it.
        seed: Seed of the first mask. Must be the seed of the ``Sparsifier``, and the same on all ranks.
        include: See ``Sparsifier``.
        exclude: See ``Sparsifier``.
        batch_size: Batch size of the measurement for ``"auto"``, without an example (times positions, for sequences); 128
            by default.
        example: A batch of inputs for ``"auto"``: a tensor, or a tuple or dict of arguments. The model is called with it
            once, to see the shapes that its layers compute. The model must not be on the meta device.
        state: A ``Sparsifier.state_dict()`` to resume from. ``"auto"`` then takes its decisions from the state, because
            measurements differ between runs.
        process_group: The processes that train this model together, by default all.

    Returns:
        The model to train: the same object, modified in place. A new module if the model itself is a linear layer.

    Raises:
        ConfigurationError: See ``Sparsifier``: an infeasible budget, a selector that selects nothing, …
    """
    check_method(method)
    if method.backend not in ("csr", "auto") or method.density == 1:
        return model
    if method.backend == "auto":
        return auto.prepare(
            model,
            method,
            seed=seed,
            include=include,
            exclude=exclude,
            batch_size=batch_size,
            example=example,
            state=state,
            group=process_group,
        )
    return prepare_csr(model, method, seed=seed, include=include, exclude=exclude)


def open_storages(
    model: nn.Module,
    layers: Sequence[SparseLayer],
    method: Method,
    *,
    seed: int = 0,
    group: ProcessGroup | None = None,
) -> Storages:
    """Create the storages of a model's sparse layers.

    Args:
        model: The model.
        layers: Its sparse layers.
        method: The method that trains it.
        seed: Seed of random choices.
        group: The process group.

    Returns:
        The storages, one per backend in use.

    Raises:
        ConfigurationError: The method has another backend than the sparse modules, they were drawn with another seed, or a
            parameter is not supported.
    """
    modules, named = sparse_modules(model), dict(model.named_parameters())
    stored = [layer for layer in layers if layer.parameter in modules]
    masked = [layer for layer in layers if layer.parameter not in modules]
    if stored and method.backend not in ("csr", "auto"):
        raise ConfigurationError(
            f'{stored[0].parameter} is a SparseLinear, and the method has backend="{method.backend}": use '
            'backend="csr", or dst.to_dense(model) to train with masks'
        )
    for layer in stored:
        drawn = modules[layer.parameter].pattern_seed
        if as_sampler(method.init) is not None and drawn not in (None, seed):
            raise ConfigurationError(
                f"{layer.parameter} was drawn by dst.prepare(seed={drawn}), and this is seed={seed}: use the same seed"
            )
    storages: list[Storage] = []
    if masked and method.relaxation is not None and method.density < 1:
        storages.append(Latent(model, masked, method.relaxation, density=method.density, seed=seed))
    elif masked:
        storages.append(Masked({x.parameter: named[x.parameter] for x in masked}, masked))
    if stored:
        storages.append(Csr({x.parameter: modules[x.parameter] for x in stored}, stored, group))
    return Storages(storages, layers)
