"""Finds the sparse layers whose outputs may be feature-major, because only sparse layers see them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx, nn
from torch.nn import functional

from dst.nn.feature_major import FeatureMajorLinear
from dst.nn.sparse_linear import SparseLinear

_ELEMENTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Dropout, nn.Identity)
_FUNCTIONS = (
    torch.relu,
    torch.tanh,
    torch.sigmoid,
    functional.relu,
    functional.gelu,
    functional.silu,
    functional.leaky_relu,
    functional.dropout,
)
_METHODS = ("relu", "tanh", "sigmoid")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SparseLinear | FeatureMajorLinear) or super().is_leaf_module(m, module_qualified_name)


def choose_layouts(model: nn.Module) -> None:
    """Set ``feature_major`` of every ``SparseLinear`` of a model.

    It is True where each use of the output ends in a linear layer that reads feature-major inputs, with nothing but
    element-wise modules and functions between. A model that ``torch.fx`` cannot trace keeps ordinary outputs.
    """
    layers = [m for m in model.modules() if type(m) is SparseLinear]
    for layer in layers:
        layer.feature_major = False
    if len(layers) == 0 or model in layers:
        return
    try:
        graph = _Tracer().trace(model)
    except Exception:  # tracing runs the model's own code, which may raise anything
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    seen_outside: set[nn.Module] = set()
    for node in graph.nodes:
        called = modules.get(str(node.target)) if node.op == "call_module" else None
        if type(called) is SparseLinear:
            called.feature_major = True
            if not _ends_in_layers(node.users, modules):
                seen_outside.add(called)
    for layer in layers:
        layer.feature_major = layer.feature_major and layer not in seen_outside


def _ends_in_layers(users: Iterable[fx.Node], modules: dict[str, nn.Module]) -> bool:
    found = False
    for user in users:
        module = modules[str(user.target)] if user.op == "call_module" else None
        if isinstance(module, SparseLinear | FeatureMajorLinear):
            found = True
            continue
        function = user.op == "call_function" and user.target in _FUNCTIONS
        method = user.op == "call_method" and user.target in _METHODS
        if not (type(module) in _ELEMENTWISE or function or method) or not _ends_in_layers(user.users, modules):
            return False
        found = True
    return found
