"""Models inside wrappers, and which optimizer holds what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.swa_utils import AveragedModel

from dst.errors import ConfigurationError

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
_NO_DEEPSPEED = (
    "DeepSpeed partitions gradients and steps its own flat copies of the weights, so no mask can be kept on them; "
    "use DDP or FSDP2"
)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers that only run it differently: compiled, DataParallel, DDP, averaged.

    Raises:
        ConfigurationError: A wrapper that flattens or owns the parameters (FSDP1, DeepSpeed).
    """
    for module in model.modules():
        kind = type(module)
        if kind.__name__ == "FullyShardedDataParallel":
            raise ConfigurationError(
                "FullyShardedDataParallel flattens weights, whose layers cannot be told apart afterwards; "
                "use FSDP2 (torch.distributed.fsdp.fully_shard), or Lightning's ModelParallelStrategy"
            )
        if kind.__module__.startswith("deepspeed"):
            raise ConfigurationError(_NO_DEEPSPEED)
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, _WRAPPERS):
            model = model.module
        else:
            return model


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
            raise ConfigurationError(_NO_DEEPSPEED)
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
