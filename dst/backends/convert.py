"""Conversion between backends: models, state dicts and optimizer states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dst.backends.swap import dense_module, exchange
from dst.errors import StateError
from dst.nn import PackedProjection, SparseLinear, SparseMultiheadAttention
from dst.topology.layers import dense_name, sparse_modules


def to_dense(model: nn.Module) -> nn.Module:
    """Swap modules that store only non-zeros for ordinary ones, with zeros at inactive weights.

    Call it before building the optimizer. To continue training with ``backend="masked"``, load the masks with
    ``Sparsifier.load_state_dict``.

    Args:
        model: The model. It is changed in place.

    Returns:
        The model. A new module if the model itself is a sparse layer.
    """
    stored = [m for m in model.modules() if isinstance(m, (SparseLinear, SparseMultiheadAttention))]
    return exchange(model, {m: dense_module(m) for m in stored if not isinstance(m, PackedProjection)})


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
    return result


def dense_optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The state dict of an optimizer as with the masked backend.

    Args:
        model: The prepared model.
        optimizer: The optimizer of its parameters.

    Returns:
        ``optimizer.state_dict()`` with per-weight state in the dense shape.
    """
    return _converted(
        optimizer, optimizer.state_dict(), model, lambda m, t: m.to_dense(t) if t.shape == m.values.shape else t
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
    return _converted(optimizer, state, model, lambda m, t: m.from_dense(t) if t.shape == m.shape else t)


def _converted(
    optimizer: Optimizer,
    state: Mapping[str, Any],
    model: nn.Module,
    convert: Callable[[SparseLinear, Tensor], Tensor],
) -> dict[str, Any]:
    """A copy of an optimizer state with the per-weight state of sparse layers converted.

    Parameters are matched by their order.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    keys = [key for group in state["param_groups"] for key in group["params"]]
    if len(keys) != len(parameters):
        raise StateError(f"the state has {len(keys)} parameters, the optimizer {len(parameters)}")
    modules = {id(module.values): module for module in sparse_modules(model).values()}
    result = {**state, "state": copy.deepcopy(dict(state["state"]))}
    for key, parameter in zip(keys, parameters, strict=True):
        module = modules.get(id(parameter))
        for name, value in result["state"].get(key, {}).items():
            if module is not None and isinstance(value, Tensor) and value.ndim:
                result["state"][key][name] = convert(module, value)
    return result
