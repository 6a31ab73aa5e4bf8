"""Conversion between backends: models, state dicts and optimizer states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from dst.backends.swap import dense_module, exchange
from dst.errors import StateError
from dst.nn import PackedProjection, RecurrentWeight, SparseLinear, SparseMultiheadAttention, SparseRecurrent
from dst.topology.layers import dense_name, sparse_modules

K = TypeVar("K", str, int)


def to_dense(model: nn.Module) -> nn.Module:
    """Swap modules that store only non-zeros for ordinary ones, with zeros at inactive weights.

    Call it before building the optimizer. To continue training with ``backend="masked"``, load the masks with
    ``Sparsifier.load_state_dict``.

    Args:
        model: The model. It is changed in place.

    Returns:
        The model. A new module if the model itself is a sparse layer.
    """
    stored = [m for m in model.modules() if isinstance(m, (SparseLinear, SparseMultiheadAttention, SparseRecurrent))]
    inner = (PackedProjection, RecurrentWeight)
    return exchange(model, {m: dense_module(m) for m in stored if not isinstance(m, inner)})


def dense_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict of a model as with the masked backend: dense weights, zero where inactive.

    The ``load_state_dict`` of a prepared model accepts such a state dict.

    Args:
        model: Any model, prepared or not.

    Returns:
        Names of the dense model to tensors, in the model's order.
    """
    modules = dict(model.named_modules())
    result: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        owner, _, attribute = name.rpartition(".")
        module = modules.get(owner)
        if not isinstance(module, SparseLinear):
            result[name] = value
        elif attribute == "values":
            result[dense_name(owner, module, "weight")] = module.dense_weight()
        elif attribute == "bias":
            result[dense_name(owner, module, "bias")] = value
    names = _in_dense_order(
        list(result), [f"{n}.{x}" if n else x for n, m in _recurrent(model) for x in m.dense_names()]
    )
    return {name: result[name] for name in names}


def dense_optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The state dict of an optimizer as with the masked backend.

    Args:
        model: The prepared model.
        optimizer: The optimizer of its parameters.

    Returns:
        ``optimizer.state_dict()`` with per-weight state in the dense shape.
    """
    return _converted(
        optimizer,
        optimizer.state_dict(),
        model,
        lambda m, t: m.to_dense(t) if t.shape == m.values.shape else t,
        to_dense=True,
    )


def sparse_optimizer_state(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an optimizer state of masked weights for the optimizer of a prepared model.

    Args:
        model: The prepared model, with the masks of the state: load the sparsifier's state first.
        optimizer: The optimizer of its parameters.
        state: ``state_dict()`` of the optimizer of the same model with the masked backend.

    Returns:
        A state for ``optimizer.load_state_dict``.

    Raises:
        StateError: The state has another number of parameters.
    """
    return _converted(
        optimizer, state, model, lambda m, t: m.from_dense(t) if t.shape == m.shape else t, to_dense=False
    )


def _converted(
    optimizer: Optimizer,
    state: Mapping[str, Any],
    model: nn.Module,
    convert: Callable[[SparseLinear, Tensor], Tensor],
    *,
    to_dense: bool,
) -> dict[str, Any]:
    """A copy of an optimizer state with the per-weight state of sparse layers converted.

    Parameters are matched by their order in either model.
    """
    inner = [getattr(m, name) for _, m in _recurrent(model) for name in m.dense_names()]
    order = [id(part.values if isinstance(part, RecurrentWeight) else part) for part in inner]
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    sparse = [key for group in groups for key in group]
    dense = [key for group in groups for key in _in_dense_order(group, order)]
    keys = [key for group in state["param_groups"] for key in group["params"]]
    if len(keys) != len(sparse):
        raise StateError(f"the state has {len(keys)} parameters, the optimizer {len(sparse)}")
    old, new = (sparse, dense) if to_dense else (dense, sparse)
    source = dict(zip(old, keys, strict=True))
    modules = {id(module.values): module for module in sparse_modules(model).values()}
    result = {}
    for parameter, key in zip(new, keys, strict=True):
        if source[parameter] not in state["state"]:
            continue
        module, entries = modules.get(parameter), copy.deepcopy(state["state"][source[parameter]])
        for name, value in entries.items():
            if module is not None and isinstance(value, Tensor) and value.ndim:
                entries[name] = convert(module, value)
        result[key] = entries
    return {**state, "state": result}


def _recurrent(model: nn.Module) -> list[tuple[str, SparseRecurrent]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SparseRecurrent)]


def _in_dense_order(keys: list[K], dense: list[K]) -> list[K]:
    """Reorder those of the keys that are in ``dense``: a sparse recurrent module has its biases before its weights.

    Args:
        keys: Parameters in the order of the sparse model. Those of other modules keep their places.
        dense: Parameters of the recurrent modules in the order of the dense model.
    """
    found = set(keys)
    ordered, chosen = iter([key for key in dense if key in found]), set(dense)
    return [next(ordered) if key in chosen else key for key in keys]
