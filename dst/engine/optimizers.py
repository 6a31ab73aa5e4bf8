"""The optimizers: which parameters each holds, and how many steps it takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer

from dst.errors import ConfigurationError
from dst.method import shown
from dst.topology.wrapping import NO_DEEPSPEED


def holders(optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Which of the optimizers holds each parameter.

    Args:
        optimizers: The optimizers.
        parameters: Name to parameter.

    Returns:
        Name to the first optimizer's number.

    Raises:
        ConfigurationError: An optimizer that no mask can be kept under, or a parameter that none holds.
    """
    held: dict[int, int] = {}
    for i, optimizer in enumerate(optimizers):
        if type(optimizer).__module__.startswith("deepspeed"):
            raise ConfigurationError(NO_DEEPSPEED)
        if isinstance(optimizer, LBFGS):
            raise ConfigurationError(
                "LBFGS evaluates the loss several times within one step, between which no mask can be kept; "
                "use a first-order optimizer such as SGD or AdamW"
            )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                held.setdefault(id(parameter), i)
    homeless = [name for name, parameter in parameters.items() if id(parameter) not in held]
    if homeless:
        raise ConfigurationError(
            f"{', '.join(homeless)} are in no optimizer: add them, or leave them dense with exclude="
        )
    return {name: held[id(parameter)] for name, parameter in parameters.items()}


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer inside a wrapper whose own step calls no hooks, such as Accelerate's ``AcceleratedOptimizer``.

    Raises:
        ConfigurationError: Something that is no optimizer.
    """
    while isinstance(optimizer, Optimizer):
        if hasattr(optimizer, "_optimizer_step_post_hooks"):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    scheduler = isinstance(getattr(optimizer, "optimizer", None), Optimizer)
    hint = "pass the optimizer that the scheduler has" if scheduler else "pass a torch.optim.Optimizer, or several"
    raise ConfigurationError(f"{shown(optimizer)} is not an optimizer; {hint}")


def as_optimizers(optimizers: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """One optimizer or several, unwrapped, as a list.

    Raises:
        ConfigurationError: Something that is no optimizer, or none at all.
    """
    several = isinstance(optimizers, Iterable) and not isinstance(optimizers, (str, bytes, Mapping))
    found = [unwrap_optimizer(x) for x in (optimizers if several else [optimizers])]  # type: ignore[union-attr]
    if not found:
        raise ConfigurationError("no optimizer was given: pass a torch.optim.Optimizer, or several")
    return found


def totals_of(total_steps: int | Sequence[int] | Mapping[Optimizer, int], optimizers: Sequence[Optimizer]) -> list[int]:
    """The number of steps that each optimizer takes in the whole training.

    Args:
        total_steps: One number for all, one for each, or a mapping from optimizer.
        optimizers: The optimizers, unwrapped.

    Raises:
        ConfigurationError: Not one positive whole number for every optimizer.
    """
    if isinstance(total_steps, Mapping):
        by_id = {id(unwrap_optimizer(optimizer)): total for optimizer, total in total_steps.items()}
        if missing := [i for i, optimizer in enumerate(optimizers) if id(optimizer) not in by_id]:
            raise ConfigurationError(f"total_steps names no steps for optimizer {missing[0]}: give one for each")
        totals = [by_id[id(optimizer)] for optimizer in optimizers]
    elif isinstance(total_steps, Sequence) and not isinstance(total_steps, str):
        if len(total_steps) != len(optimizers):
            raise ConfigurationError(
                f"total_steps={list(total_steps)} has {len(total_steps)} numbers for {len(optimizers)} optimizers"
            )
        totals = list(total_steps)
    else:
        totals = [total_steps] * len(optimizers)
    for total in totals:
        if isinstance(total, bool) or not isinstance(total, int) or total < 1:
            raise ConfigurationError(f"total_steps={total_steps!r} must be a positive number of optimizer steps")
    return totals
