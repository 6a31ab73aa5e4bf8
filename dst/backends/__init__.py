"""How weights are stored: one module per backend."""

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
    state: Mapping[str, Any] | None = None,
    process_group: ProcessGroup | None = None,
) -> nn.Module:
    """Swap modules for ones that store only non-zeros, where the method's backend has such.

    Call it before the optimizer is built, whatever the backend: the masked backend trains ordinary modules, and the model
    comes back as it is. The Lightning callback calls it by itself.

    With ``backend="csr"`` every ``nn.Linear`` that is to be sparse becomes a ``dst.nn.SparseLinear``, and every 1×1
    convolution a ``dst.nn.SparseConv2d``, with the method's first connections: those that the masked backend would choose for the same seed. Other sparse layers stay masked, and
    linear layers that keep all their weights stay dense; ``dst.plan`` tells which. A model that was prepared before comes
    back as it is. Linear layers may be on the meta device where the first connections are random: the dense weight then
    never exists, and values are drawn with the fan-in of the sparse layer.

    With ``backend="auto"`` that happens to those layers alone whose forward and backward pass is faster so, by a short
    measurement (of the first process, where there are several); a line for each says what was chosen and why. A method that
    needs more than non-zeros stays masked throughout.

    Args:
        model: The model.
        method: The method that will train it.
        seed: As for ``Sparsifier``: the same there and on all ranks.
        include: As for ``Sparsifier``.
        exclude: As for ``Sparsifier``.
        batch_size: Examples of a batch (times positions, for sequences), which ``"auto"`` measures with; 128 by default.
        state: A ``Sparsifier.state_dict()`` to go on from: ``"auto"`` then keeps what was chosen for it. Times differ
            from run to run, and with them what is chosen.
        process_group: The processes that train this model together, by default all.

    Returns:
        The model to train: the same object, modified in place where the backend needs it (a new one if the model itself is
        a linear layer).

    Raises:
        ConfigurationError: As for ``Sparsifier``: an infeasible budget, a selector that selects nothing, …
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
    """The storages of a model's sparse layers.

    Args:
        model: The model.
        layers: Its sparse layers.
        method: The method that trains it.
        seed: The seed of random choices.
        group: The processes that train together.

    Returns:
        One storage per backend in use, behind one object.

    Raises:
        ConfigurationError: Sparse modules under a method of another backend or drawn with another seed, or parameters that
            cannot be trained.
    """
    modules, named = sparse_modules(model), dict(model.named_parameters())
    stored = [layer for layer in layers if layer.parameter in modules]
    masked = [layer for layer in layers if layer.parameter not in modules]
    if stored and method.backend not in ("csr", "auto"):
        raise ConfigurationError(
            f'{stored[0].parameter} is a SparseLinear, and the method has backend="{method.backend}": use '
            'backend="csr", or dst.to_dense(model) to go on with masks'
        )
    for layer in stored:
        drawn = modules[layer.parameter].pattern_seed
        if as_sampler(method.init) is not None and drawn not in (None, seed):
            raise ConfigurationError(
                f"{layer.parameter} was drawn by dst.prepare(seed={drawn}), and this is seed={seed}: give both the same"
            )
    storages: list[Storage] = []
    if masked and method.relaxation is not None and method.density < 1:
        storages.append(Latent(model, masked, method.relaxation, density=method.density, seed=seed))
    elif masked:
        storages.append(Masked({x.parameter: named[x.parameter] for x in masked}, masked))
    if stored:
        storages.append(Csr({x.parameter: modules[x.parameter] for x in stored}, stored, group))
    return Storages(storages, layers)
