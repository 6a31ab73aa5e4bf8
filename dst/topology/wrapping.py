"""Unwrapping models: compiled, DDP, averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from dst.errors import ConfigurationError

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)

NO_DEEPSPEED = (
    "DeepSpeed partitions gradients and updates its own flat copies of the weights, which cannot be masked; use DDP or "
    "FSDP2"
)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, DataParallel, DDP or AveragedModel.

    Raises:
        ConfigurationError: The wrapper flattens or owns the parameters (FSDP1, DeepSpeed).
    """
    for module in model.modules():
        kind = type(module)
        if kind.__name__ == "FullyShardedDataParallel":
            raise ConfigurationError(
                "FullyShardedDataParallel flattens the weights, and their layers cannot be told apart; "
                "use FSDP2 (torch.distributed.fsdp.fully_shard), or Lightning's ModelParallelStrategy"
            )
        if kind.__module__.startswith("deepspeed"):
            raise ConfigurationError(NO_DEEPSPEED)
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, _WRAPPERS):
            model = model.module
        else:
            return model


def drop_hooks(module: nn.Module, predicate: Callable[[Any], bool]) -> None:
    """Remove forward hooks and pre-hooks without their handles. A copied module has the hooks and not the handles.

    Args:
        module: The module.
        predicate: Whether to remove a hook.
    """
    kept = [hooks for name, hooks in vars(module).items() if name.startswith(("_forward_hooks", "_forward_pre_hooks"))]
    for number in [n for hooks in kept for n, hook in hooks.items() if predicate(hook)]:
        for hooks in kept:
            hooks.pop(number, None)
