"""Where weights live: one module per backend."""

from __future__ import annotations

from torch import nn

from dst.method import Method


def prepare(model: nn.Module, method: Method) -> nn.Module:
    """Swap modules for ones that store only non-zeros, where the method's backend has such.

    Call it before the optimizer is built, whatever the backend: the masked backend trains ordinary modules, and the model
    comes back as it is. The Lightning callback calls it by itself.

    Args:
        model: The model.
        method: The method that will train it.

    Returns:
        The model to train: the same object, modified in place where the backend needs it.
    """
    # Method refuses unknown backends, and "masked" keeps ordinary modules.
    return model
