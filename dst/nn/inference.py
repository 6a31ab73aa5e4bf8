"""Fast inference: a chain of sparse and dense linear layers computed in one call."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dst.errors import ConfigurationError
from dst.kernels import Kernels
from dst.kernels.native import ChainLayer, Plan
from dst.nn.sparse_linear import (
    FeatureMajorLinear,
    SparseLinear,
    Watched,
    is_autocast,
    is_grad_enabled,
    readable,
    unchanged,
    watch,
)

_DENSE = (nn.Linear, FeatureMajorLinear)
_RELU = (torch.relu, torch.relu_, functional.relu, functional.relu_)


class _Prepared(NamedTuple):
    """A plan and what it was made from; one object, so that threads see all of it or nothing.

    Attributes:
        plan: the chain in one call.
        watched: where the parameters were, and which values.
    """

    plan: Plan
    watched: list[Watched]


class InferenceChain(nn.Module):
    """A model that is a chain of linear layers, with its evaluation computed in one call; see `optimize_for_inference`.

    Attributes:
        model: the model given, whose parameters these are.

    Shape:
        - Input: what ``model`` takes; ``(batch, in_features)``, or more dimensions where it flattens them, is fast.
        - Output: as ``model``'s: ``(batch, out_features)`` whose storage is feature-major.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False
        chain = _Chain(model)
        self._layers, self._flattens = chain.layers, chain.flattens
        self._dropouts, self._places = chain.dropouts, chain.places
        self._hooks = [*chain.hooks, self._forward_hooks, self._forward_pre_hooks]
        self._prepared: _Prepared | None = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Apply the model."""
        if not (args or kwargs):
            y = self._run(x)
            if y is not None:
                return y
        return super().__call__(x, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Let the model compute, module by module."""
        return self.model(*args, **kwargs)

    def _run(self, x: Tensor) -> Tensor | None:
        """Apply the model in one call, or return None where that would not be the same."""
        if is_grad_enabled() or is_autocast() or self.training:
            return None
        prepared = self._prepared
        if prepared is None or not unchanged(prepared.watched) or (self._dropouts and not self._drops_nothing()):
            prepared = self._prepared = self._prepare()
            if prepared is None:
                return None
        return prepared.plan.run(x.flatten(1) if self._flattens and x.dim() > 2 else x)

    def _drops_nothing(self) -> bool:
        return not any(dropout.training for dropout in self._dropouts)

    def _is_plain(self) -> bool:
        """Whether the model's modules are those it was made of, without hooks and with dropout off."""
        # Equal lists hold the same objects: modules compare by identity.
        same = all([*children.values()] == expected for children, expected in self._places)
        return same and not any(self._hooks) and self._drops_nothing()

    def _prepare(self) -> _Prepared | None:
        """Plan the chain as it is now; None where only the modules themselves can compute it."""
        watched: list[Watched] = []
        layers: list[ChainLayer] = []
        for module, relu in self._layers:
            if isinstance(module, SparseLinear):
                prepared = module.chain_layer()
                if prepared is None:
                    return None
                layer, key = prepared
                watched += watch(module, "values", key), watch(module, "bias")
                layers.append(layer._replace(relu=layer.relu or relu))
            else:
                dense = _dense_layer(module, relu)
                if dense is None:
                    return None
                watched += watch(module, "weight"), watch(module, "bias")
                layers.append(dense)
        if not self._is_plain() or len({layer.values.dtype for layer in layers}) > 1:
            return None
        if any(a.rows != b.columns for a, b in pairwise(layers)):
            return None
        # Sparse layers are there, and said that their engine is the compiled one.
        kernels = next(m._engine for m, _ in self._layers if isinstance(m, SparseLinear))
        return _Prepared(kernels.plan(layers), watched) if isinstance(kernels, Kernels) else None

    def train(self, mode: bool = True) -> InferenceChain:
        """Switch between training and evaluation, as every module does."""
        self._prepared = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # What is found out about the model is found anew in the copy: it names the copy's own modules.
        derived = ("_prepared", "_layers", "_flattens", "_dropouts", "_places", "_hooks")
        return {key: value for key, value in self.__dict__.items() if key not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        chain = _Chain(self.model)
        self._layers, self._flattens = chain.layers, chain.flattens
        self._dropouts, self._places = chain.dropouts, chain.places
        self._hooks = [*chain.hooks, self._forward_hooks, self._forward_pre_hooks]
        self._prepared = None


def optimize_for_inference(model: nn.Module) -> InferenceChain:
    """Let a model that is a chain of linear layers be evaluated in one call.

    A chain is made of `SparseLinear`, ``nn.Linear``, ReLU (module, function or method), dropout (nothing in evaluation)
    and flattening before the first layer; ``nn.Sequential`` and ``forward`` methods alike, as ``torch.fx`` follows them.
    The results are those of the modules up to rounding: in small batches it is calls, not arithmetic, that this saves.

    The result shares the model's parameters and follows them: steps of an optimizer, ``load_state_dict`` and changes of
    topology are seen at the next call. Wherever one call cannot give what the modules would, the model itself computes:
    with gradients enabled, in training, under autocast, in 16-bit types, with forward hooks, with a layer in the place of
    another, and without compiled kernels. Hooks and replaced layers are looked for at the first call after ``eval`` or
    after weights changed: looking at every call would cost as much as a layer. Writes through ``values.data`` need
    `SparseLinear.refresh`, as ever.

    Several threads may call the result at the same time.

    Args:
        model: the model, in evaluation mode; left as it is.

    Returns:
        A module to call in its place under ``torch.inference_mode()`` or ``torch.no_grad()``.

    Raises:
        ConfigurationError: the model is in training mode, is no such chain, or has no sparse layer.
    """
    if model.training:
        raise ConfigurationError("the model is in training mode; call model.eval() before optimize_for_inference")
    return InferenceChain(model)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SparseLinear | FeatureMajorLinear) or super().is_leaf_module(m, module_qualified_name)


class _Chain:
    """What a model computes, where it is a chain.

    Attributes:
        layers: linear modules in order, each with whether ReLU follows.
        flattens: whether the input is flattened first.
        dropouts: modules that do nothing only in evaluation.
        places: of every module with children, where it holds them and which they are.
        hooks: the dicts of forward hooks of every module; one call knows nothing of hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[tuple[SparseLinear | nn.Linear, bool]] = []
        self.flattens = False
        self.dropouts: list[nn.Module] = []
        self._modules = dict(model.named_modules(remove_duplicate=False))
        try:
            # A root that is itself one layer would be traced into.
            nodes = list(_Tracer().trace(nn.Sequential(model) if isinstance(model, SparseLinear) else model).nodes)
        except Exception as error:
            raise ConfigurationError(
                f"{type(model).__name__} cannot be followed ({error}); optimize_for_inference takes chains of linear layers"
            ) from error
        if isinstance(model, SparseLinear):
            self._modules = {"0": model}
        self._follow(nodes)
        if not any(isinstance(module, SparseLinear) for module, _ in self.layers):
            raise ConfigurationError("the model has no sparse layer: there is nothing to optimize")
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
            raise ConfigurationError("the model takes no input; optimize_for_inference takes chains of linear layers")
        for before, node in pairwise(nodes):
            if node.all_input_nodes != [before] or node.args[:1] != (before,):
                raise ConfigurationError(
                    f"{node} does not follow {before} alone; optimize_for_inference takes chains of linear layers"
                )
            if node.op != "output" and not self._take(node):
                target = self._modules[str(node.target)] if node.op == "call_module" else node.target
                kind = type(target).__name__ if isinstance(target, nn.Module) else getattr(target, "__name__", target)
                raise ConfigurationError(
                    f"{node} is {kind}; optimize_for_inference takes linear layers, ReLU, dropout, and flattening first"
                )

    def _take(self, node: fx.Node) -> bool:
        """Add one operation; False where it is none of a chain's."""
        if node.op == "call_module":
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
        # Activations between layers are flat already if the input was.
        self.flattens = self.flattens or not self.layers
        return (first, last) == (1, -1)


def _dense_layer(module: nn.Linear, relu: bool) -> ChainLayer | None:
    """A dense layer for a plan, or None where the kernels cannot read its parameters."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if weight is None or weight.dim() != 2 or not readable(weight, tuple(weight.shape)):
        return None
    if bias is not None and not (readable(bias, weight.shape[:1]) and bias.dtype is weight.dtype):
        return None
    shift = None if bias is None else bias.detach()
    return ChainLayer(weight.shape[0], weight.shape[1], None, weight.detach(), shift, relu)
