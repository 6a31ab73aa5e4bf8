"""Tracing a model that is a chain of linear layers with ``torch.fx``."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from dst.errors import ConfigurationError
from dst.nn.feature_major import FeatureMajorLinear
from dst.nn.sparse_linear import SparseLinear

_DENSE = (nn.Linear, FeatureMajorLinear)
_RELU = (torch.relu, torch.relu_, functional.relu, functional.relu_)


class NotAChain(ConfigurationError):
    """The model cannot be traced or has other operations than those of a chain."""


class Tracer(fx.Tracer):
    """Traces a model down to its layers, sparse layers included."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether to record a call of ``m`` instead of the operations within."""
        return isinstance(m, SparseLinear | FeatureMajorLinear) or super().is_leaf_module(m, module_qualified_name)


class Chain:
    """The operations of a model that is a chain.

    Attributes:
        layers: Linear modules in order, each with whether ReLU follows it.
        flattens: Whether the input is flattened first.
        dropouts: Dropout modules. They are the identity only in evaluation.
        places: For every module with children, its dict of children and the children when it was traced.
        hooks: The dicts of forward hooks of all modules.

    Raises:
        NotAChain: The model cannot be traced or is not a chain.
        ConfigurationError: The chain has no sparse layer, or sizes of its layers do not fit.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[tuple[SparseLinear | nn.Linear, bool]] = []
        self.flattens = False
        self.dropouts: list[nn.Module] = []
        self._modules = dict(model.named_modules(remove_duplicate=False))
        try:
            # A root is never a leaf: wrap a model that is a single layer.
            nodes = list(Tracer().trace(nn.Sequential(model) if isinstance(model, SparseLinear) else model).nodes)
        except Exception as error:
            raise NotAChain(f"{type(model).__name__} cannot be traced ({error})") from error
        if isinstance(model, SparseLinear):
            self._modules = {"0": model}
        self._follow(nodes)
        if not any(isinstance(module, SparseLinear) for module, _ in self.layers):
            raise ConfigurationError("the model has no sparse layer to optimize")
        for (a, _), (b, _) in pairwise(self.layers):
            if a.out_features != b.in_features:
                raise ConfigurationError(
                    f"a layer with {a.out_features} outputs precedes one with {b.in_features} inputs"
                )
        held = list(model.modules())
        self.places = [(m._modules, [*m._modules.values()]) for m in held if m._modules]
        self.hooks = [hooks for m in held for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def _follow(self, nodes: list[fx.Node]) -> None:
        if len(nodes) < 2 or nodes[0].op != "placeholder" or nodes[-1].op != "output":
            raise NotAChain("the model takes no input")
        for before, node in pairwise(nodes):
            if node.all_input_nodes != [before] or node.args[:1] != (before,):
                raise NotAChain(f"{node} has an input other than {before}")
            if node.op != "output" and not self._take(node):
                raise NotAChain(f"{node} is not an operation of a chain")

    def _take(self, node: fx.Node) -> bool:
        """Add one operation. Return False if a chain cannot contain it."""
        if node.op == "call_module":
            if len(node.args) != 1 or node.kwargs:  # another activation, for example
                return False
            module = self._modules[str(node.target)]
            if type(module) in (SparseLinear, *_DENSE):
                assert isinstance(module, SparseLinear | nn.Linear)
                self.layers.append((module, False))
                return True
            if isinstance(module, nn.Dropout):
                self.dropouts.append(module)
                return True
            if type(module) is nn.Flatten:
                return self._flatten(module.start_dim, module.end_dim)
            return type(module) is nn.Identity or (type(module) is nn.ReLU and self._relu())
        if node.target in _RELU or (node.op == "call_method" and node.target in ("relu", "relu_")):
            return self._relu()
        if node.target is torch.flatten or (node.op == "call_method" and node.target == "flatten"):
            names = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
            return self._flatten(names.get("start_dim", 0), names.get("end_dim", -1))
        return False

    def _relu(self) -> bool:
        if self.layers:
            self.layers[-1] = (self.layers[-1][0], True)
        return bool(self.layers)

    def _flatten(self, first: Any, last: Any) -> bool:
        # Activations between layers are already flat.
        self.flattens = self.flattens or not self.layers
        return (first, last) == (1, -1)
