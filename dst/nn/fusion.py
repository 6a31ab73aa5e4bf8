"""Folding batch normalisation and ReLU into the layers before them, in a graph of ``torch.fx``."""

from __future__ import annotations

import inspect
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dst.errors import ConfigurationError
from dst.nn.chain import Tracer
from dst.nn.passes import COMPUTED
from dst.nn.sparse_conv import SparseConv2d
from dst.nn.sparse_linear import SparseLinear

# Exact types: a subclass may compute something else.
_NORMALISED: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.BatchNorm1d: (nn.Linear, SparseLinear),
    nn.BatchNorm2d: (nn.Conv2d, SparseConv2d),
}
_SPARSE = (SparseLinear, SparseConv2d)
_FRESH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.Conv2d, nn.Linear)
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_RELU_FUNCTIONS = (torch.relu, torch.relu_, functional.relu, functional.relu_)


class Untraceable(Exception):
    """The model cannot be traced faithfully; the text gives the reason."""


class Fused(NamedTuple):
    """A fused model.

    Attributes:
        module: Computes the model in evaluation.
        folded: Names of the batch normalisations that are folded into the layer before them.
        relus: Names of the sparse layers that compute the ReLU after them.
    """

    module: fx.GraphModule
    folded: list[str]
    relus: list[str]


class TwoDimensional(nn.Module):
    """Returns its input, which must be ``(batch, features)``.

    Batch normalisation normalises dimension 1. That is the output of a linear layer only if there are two dimensions.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Check the input."""
        if x.dim() != 2:
            raise ConfigurationError(
                f"the input of a linear layer with folded batch normalisation is {tuple(x.shape)}; optimize_for_inference "
                "supports (batch, features) there"
            )
        return x


class _LeafTracer(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, TwoDimensional) or super().is_leaf_module(m, module_qualified_name)


def fuse(model: nn.Module) -> Fused:
    """Fuse operations of a model in evaluation mode.

    Batch normalisation is folded into the convolution or linear layer before it, ReLU into the sparse layer before it. Both
    need a layer that is called once and whose output has no other use. Dropout is removed. Any other ReLU works in place if nothing
    else reads its input.

    Args:
        model: The model. Its layers are changed, so pass a copy.

    Raises:
        Untraceable: ``torch.fx`` cannot trace the model, or not faithfully: its ``forward`` has optional arguments, or a
            module with children has hooks.
    """
    graph = _trace(model)
    module = fx.GraphModule(model, graph, type(model).__name__)
    # Nodes are in the order of computation: when a node is visited, the nodes before it are already fused.
    folded, relus = [], []
    for node in list(graph.nodes):
        layer = _module(module, node)
        if (
            layer is not None
            and type(layer) in _IDENTITIES
            and not _has_hooks(layer)
            and len(node.args) == 1
            and not node.kwargs
        ):
            _skip(node)
        elif type(layer) in _NORMALISED and _fold(module, node):
            folded.append(str(node.target))
            _skip(node)
        elif _is_relu(node, layer):
            before = node.args[0]
            assert isinstance(before, fx.Node)
            sparse = _fusable(module, before, _SPARSE)
            if isinstance(sparse, SparseLinear):
                sparse.relu = True
                relus.append(str(before.target))
                _skip(node)
            elif _is_fresh(module, before):
                node.op, node.target, node.kwargs = "call_function", torch.relu_, {}
    graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()
    return Fused(module, folded, relus)


def _trace(model: nn.Module) -> fx.Graph:
    # A traced model calls only leaves, and sees an optional argument as given.
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise Untraceable("its forward has optional arguments")
    tracer = _LeafTracer()
    for name, module in model.named_modules():
        if _has_hooks(module) and (not name or not tracer.is_leaf_module(module, name)):
            raise Untraceable(f"{name or 'the model'} has hooks")
    try:
        return tracer.trace(model)
    except Exception as error:
        raise Untraceable(str(error)) from error


def _module(root: nn.Module, node: fx.Node) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _skip(node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    node.graph.erase_node(node)


def _has_hooks(module: nn.Module) -> bool:
    """Whether a call does more than the ``forward`` of the class."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def _is_fresh(root: nn.Module, node: fx.Node) -> bool:
    """Whether ``node`` returns a new tensor that is used once."""
    layer = _module(root, node)
    new = node.target is operator.add if layer is None else type(layer) in _FRESH and not _has_hooks(layer)
    return len(node.users) == 1 and new


def _is_relu(node: fx.Node, layer: nn.Module | None) -> bool:
    if len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        return type(layer) is nn.ReLU and not _has_hooks(layer)
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target in _RELU_FUNCTIONS


def _fusable(root: nn.Module, node: fx.Node, types: tuple[type[nn.Module], ...]) -> nn.Module | None:
    """Return the layer that ``node`` calls. None if the next operation cannot be fused into it."""
    layer = _module(root, node)
    if layer is None or type(layer) not in types or len(node.users) != 1 or _has_hooks(layer):
        return None
    if len(node.args) != 1 or node.kwargs:
        return None
    # Fusing would change the result of a second call of the layer, or of another use of its parameters.
    held = {id(layer), *map(id, layer.parameters())}
    for other in node.graph.nodes:
        if other is not node and other.op in ("call_module", "get_attr") and held & _held(root, str(other.target)):
            return None
    return layer


def _held(root: Any, target: str) -> set[int]:
    for name in target.split("."):
        root = getattr(root, name)
    return {id(root)}


def _fold(root: nn.Module, node: fx.Node) -> bool:
    """Fold the batch normalisation at ``node`` into the layer before it. Return False if that would change results."""
    norm = _module(root, node)
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    before = node.args[0] if len(node.args) == 1 else None
    if not isinstance(before, fx.Node) or _has_hooks(norm):
        return False
    layer = _fusable(root, before, _NORMALISED[type(norm)])
    mean, variance = norm.running_mean, norm.running_var
    # Without running statistics, those of the batch are used in evaluation too.
    if layer is None or mean is None or variance is None:
        return False
    if isinstance(layer, SparseLinear):
        weight: Tensor = layer.values
        outputs, rows = layer.out_features, layer._pattern.row_indices.to(torch.int64)
        if layer.relu:
            return False
    else:
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        weight, outputs, rows = layer.weight, layer.weight.shape[0], None
    if weight.dtype not in COMPUTED or mean.dtype is not weight.dtype or outputs != norm.num_features:
        return False
    scale, shift = _affine(norm, mean, variance)
    with torch.no_grad():
        factor = scale.view(-1, *[1] * (weight.dim() - 1)) if rows is None else scale[rows]
        folded = nn.Parameter((weight.double() * factor).to(weight.dtype), requires_grad=False)
        if layer.bias is not None:
            shift = shift + layer.bias.double() * scale
        layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)
    if isinstance(layer, SparseLinear):
        layer.values = folded
        layer.refresh()
    else:
        layer.weight = folded
    if isinstance(norm, nn.BatchNorm1d):
        _check_dimensions(root, before)
    return True


def _affine(norm: nn.BatchNorm1d | nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel, float64."""
    scale = (variance.detach().double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean.detach().double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def _check_dimensions(root: nn.Module, node: fx.Node) -> None:
    """Make the layer that ``node`` calls check its input."""
    name = f"{str(node.target).replace('.', '_')}_input"
    while hasattr(root, name):
        name += "_"
    root.add_module(name, TwoDimensional())
    with node.graph.inserting_before(node):
        checked = node.graph.call_module(name, node.args, node.kwargs)
    node.args, node.kwargs = (checked,), {}
