"""From non-zeros to masked weights and back: models, their state dicts, their optimizers' states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dst.backends.swap import dense_module, exchange
from dst.errors import StateError
from dst.nn import SparseLinear
from dst.topology.layers import sparse_modules


def to_dense(model: nn.Module) -> nn.Module:
    """Exchange modules that store only non-zeros for the ordinary ones that they stand for.

    Call it before an optimizer is built. A sparsifier with ``backend="masked"`` goes on with it once it has loaded the masks
    (``Sparsifier.load_state_dict``).

    Args:
        model: Changed in place.

    Returns:
        The model; a new module where it is itself a sparse layer.
    """
    return exchange(model, {m: dense_module(m) for m in model.modules() if isinstance(m, SparseLinear)})


def dense_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict that the same model would have with masked weights: inactive ones are zeros.

    The other way needs no function: a prepared model's ``load_state_dict`` takes masked weights.

    Args:
        model: Any model, prepared or not.

    Returns:
        Names of the dense model to tensors, in its order.
    """
    stored = sparse_modules(model)
    result: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        owner, _, attribute = name.rpartition(".")
        weight = f"{owner}.weight" if owner else "weight"
        if weight not in stored:
            result[name] = value
        elif attribute == "values":
            result[weight] = stored[weight].dense_weight()
        elif attribute == "bias":
            result[name] = value
    return result


def dense_optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The state dict that an optimizer would have over masked weights.

    Args:
        model: The prepared model.
        optimizer: Over its parameters.

    Returns:
        As ``optimizer.state_dict()``, with per-weight state of dense shape.
    """
    return _converted(
        optimizer, optimizer.state_dict(), model, lambda m, t: m.to_dense(t) if t.shape == m.values.shape else t
    )


def sparse_optimizer_state(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state over masked weights, as one over non-zeros can load it.

    Args:
        model: The prepared model, on the connections that the state belongs to: load the sparsifier's state first.
        optimizer: Over its parameters.
        state: ``state_dict()`` of an optimizer over the same model with masked weights.

    Returns:
        What ``optimizer.load_state_dict`` takes.

    Raises:
        StateError: The state is of another number of parameters.
    """
    return _converted(optimizer, state, model, lambda m, t: m.from_dense(t) if t.shape == m.shape else t)


def _converted(
    optimizer: Optimizer,
    state: Mapping[str, Any],
    model: nn.Module,
    convert: Callable[[SparseLinear, Tensor], Tensor],
) -> dict[str, Any]:
    """A state dict with the per-weight state of sparse layers converted, in memory of its own.

    Parameters go by their order.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    keys = [key for group in state["param_groups"] for key in group["params"]]
    if len(keys) != len(parameters):
        raise StateError(f"the state is of {len(keys)} parameters, the optimizer has {len(parameters)}")
    modules = {id(module.values): module for module in sparse_modules(model).values()}
    result = {**state, "state": copy.deepcopy(dict(state["state"]))}
    for key, parameter in zip(keys, parameters, strict=True):
        module = modules.get(id(parameter))
        for name, value in result["state"].get(key, {}).items():
            if module is not None and isinstance(value, Tensor) and value.ndim:
                result["state"][key][name] = convert(module, value)
    return result
