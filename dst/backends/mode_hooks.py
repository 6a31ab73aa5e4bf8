"""Forward pre-hooks that report changes between training and evaluation mode."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from dst.topology.wrapping import drop_hooks


class ModeHook:
    """A forward pre-hook that calls a bound method of a storage.

    The reference to the storage is weak. Copies of the hook, which belong to copies of the model, do nothing.
    """

    def __init__(self, method: Callable[[], None] | None = None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Call the method if the storage still exists."""
        method = None if self._method is None else self._method()
        if method is not None:
            method()

    def __reduce__(self) -> tuple[type[ModeHook], tuple[()]]:
        return ModeHook, ()


class ModeHooks:
    """The hooks of a storage on all modules that contain its parameters, directly or in submodules.

    Args:
        model: The model.
        names: Names of the parameters.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        prefixes: dict[str, None] = {}
        for name in names:
            parts = name.split(".")[:-1]
            prefixes |= dict.fromkeys(".".join(parts[:i]) for i in range(len(parts) + 1))
        self._modules = [model.get_submodule(prefix) for prefix in prefixes]
        self._handles: list[RemovableHandle] = []

    @property
    def installed(self) -> bool:
        """Whether the hooks are installed."""
        return bool(self._handles)

    def install(self, method: Callable[[], None]) -> None:
        """Call a bound method before every forward pass, unless hooks are installed already."""
        if not self._handles:
            hook = ModeHook(method)
            self._handles = [module.register_forward_pre_hook(hook) for module in self._modules]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def drop_copies(self) -> None:
        """Remove the hooks that a copied model has from its original."""
        for module in self._modules:
            drop_hooks(module, lambda hook: isinstance(hook, ModeHook))
