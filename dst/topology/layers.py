"""Finding the sparse layers of a model.

The weights of linear, convolution, attention and recurrent modules become sparse. Norms, biases and embeddings stay dense
unless ``include`` selects them by name or type. A tensor that several modules share counts once.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dst.errors import ConfigurationError
from dst.nn import (
    PackedProjection,
    RecurrentWeight,
    SparseConv1D,
    SparseConv2d,
    SparseLinear,
    SparseMultiheadAttention,
    SparseRecurrent,
)

Selector = str | type[nn.Module]
"""A shell-style pattern for parameter, layer or module names, or a module type."""

_WEIGHT_MODULES = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, SparseRecurrent)


@dataclass(frozen=True)
class SparseLayer:
    """A weight, or a part of one, with its own budget.

    Attributes:
        label: Unique name: the parameter name, followed by the part in brackets, if any (``attn.in_proj_weight[q]``).
        parameter: Name in ``model.named_parameters()``.
        kind: Class name of the module that owns the parameter.
        shape: Shape of the part.
        rows: Half-open range of dimension 0 that the part covers, or ``None`` for the whole parameter.
        output_dim: The output dimension: 1 for transposed convolutions and the ``Conv1D`` of transformers, otherwise 0.
        is_oriented: Whether ``output_dim`` is known. It is assumed for custom modules.
    """

    label: str
    parameter: str
    kind: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    output_dim: int = 0
    is_oriented: bool = True

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def offset(self) -> int:
        """Row-major position of the layer's first weight in the parameter."""
        return 0 if self.rows is None else self.rows[0] * math.prod(self.shape[1:])

    def part(self, tensor: Tensor) -> Tensor:
        """View of the layer's part of a tensor that has the parameter's shape."""
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]


@dataclass(frozen=True)
class DenseWeight:
    """A weight that stays dense.

    Attributes:
        name: Name in ``model.named_parameters()``.
        kind: Class name of the module that owns the parameter.
        shape: Shape of the weight.
        reason: Why it stays dense.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: str


def find_layers(
    model: nn.Module,
    include: Iterable[Selector] | None = None,
    exclude: Iterable[Selector] | None = None,
) -> tuple[list[SparseLayer], list[DenseWeight]]:
    """Find the sparse layers and the dense weights of a model.

    Args:
        model: Any module.
        include: If given, only the selected weights are sparse. May select weights that stay dense by default: embeddings,
            and parameters of custom modules with two or more dimensions.
        exclude: The selected weights stay dense.

    Returns:
        The sparse layers, and the dense weights with two or more dimensions, both in the model's order.

    Raises:
        ConfigurationError: A selector selects nothing, a lazy module is not initialized, or the model has no weight that
            can be sparse.
    """
    include = None if include is None else _selectors(include, "include")
    exclude = _selectors(exclude or (), "exclude")
    owners = _owners(model)
    used: set[Selector] = set()
    layers: list[SparseLayer] = []
    dense: list[DenseWeight] = []
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ConfigurationError(f"{name} has no shape yet: run one batch through the lazy module first")
        for full, _, module in owners[id(parameter)]:
            _check_not_pruned(full, module)
        stored = _stored(name, owners[id(parameter)])
        if parameter.ndim < 2 and stored is None:
            continue
        for layer in stored or _parts(name, parameter, owners[id(parameter)]):
            names = {layer.label, *(n for full, m, _ in owners[id(parameter)] for n in (full, m))}
            if stored is not None:
                names |= {layer.parameter, layer.parameter.rpartition(".")[0]}
            modules = [module for _, _, module in owners[id(parameter)]]
            included = _selected(include, names, modules, used) if include is not None else None
            excluded = _selected(exclude, names, modules, used)
            reason = _reason_to_stay_dense(parameter, owners[id(parameter)], included, excluded)
            if stored is not None and reason is not None:
                raise ConfigurationError(
                    f"{layer.label} stores only its non-zeros and cannot be dense ({reason}): pass the same include and "
                    "exclude to dst.prepare"
                )
            if reason is None:
                layers.append(layer)
            else:
                dense.append(DenseWeight(layer.label, layer.kind, layer.shape, reason))
    unused = [s for s in [*(include or ()), *exclude] if s not in used]
    if unused:
        known = ", ".join(name for name, p in model.named_parameters() if p.ndim >= 2)
        shown = ", ".join(s if isinstance(s, str) else s.__name__ for s in unused)
        raise ConfigurationError(f"include/exclude {shown} selects no weight; the weights are {known or 'none'}")
    if not layers:
        reasons = "; ".join(f"{d.name}: {d.reason}" for d in dense) or "it has no weight with two dimensions or more"
        raise ConfigurationError(f"nothing in {type(model).__name__} can be sparse ({reasons}); see include=")
    return layers, dense


def sparse_modules(model: nn.Module) -> dict[str, SparseLinear]:
    """The modules of a model that store only non-zeros, by the name of the dense weight that they replace."""
    return {
        dense_name(name, module, "weight"): module
        for name, module in model.named_modules()
        if isinstance(module, SparseLinear)
    }


def dense_name(name: str, module: SparseLinear, attribute: str) -> str:
    """The name of the weight or bias of a sparse module in the dense model.

    Args:
        name: Name of the module.
        module: The module.
        attribute: ``"weight"`` or ``"bias"``.
    """
    if isinstance(module, RecurrentWeight):
        return name
    return f"{name}{'_' if isinstance(module, PackedProjection) else '.'}{attribute}" if name else attribute


def _stored(name: str, owners: Sequence[tuple[str, str, nn.Module]]) -> list[SparseLayer] | None:
    """The layers whose non-zeros a parameter holds, or ``None``."""
    module, attribute = owners[0][2], name.rpartition(".")[2]
    if not isinstance(module, SparseLinear) or attribute != "values":
        return None
    weight = dense_name(name.rpartition(".")[0], module, "weight")
    if isinstance(module, PackedProjection):
        return _packed(weight, SparseMultiheadAttention.__name__, module.shape)
    output_dim = 1 if isinstance(module, SparseConv1D) else 0
    return [SparseLayer(weight, weight, type(module).__name__, module.shape, output_dim=output_dim)]


def _selectors(selectors: Iterable[Selector], name: str) -> list[Selector]:
    if isinstance(selectors, (str, type)):
        raise ConfigurationError(f"{name}={selectors!r} must be a list of names, patterns or module types")
    return list(selectors)


def _owners(model: nn.Module) -> dict[int, list[tuple[str, str, nn.Module]]]:
    """Map the id of each parameter to (full name, module name, module) of every module that holds it."""
    owners: dict[int, list[tuple[str, str, nn.Module]]] = {}
    for module_name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{module_name}.{attribute}" if module_name else attribute
            owners.setdefault(id(parameter), []).append((full, module_name, module))
    return owners


def _is_gain(name: str, module: nn.Module) -> bool:
    """Whether a parameter is the gain of old-style ``torch.nn.utils.weight_norm``."""
    attribute = name.rpartition(".")[2]
    return attribute.endswith("_g") and hasattr(module, attribute.removesuffix("_g") + "_v")


def _check_not_pruned(name: str, module: nn.Module) -> None:
    """Refuse weights that ``torch.nn.utils.prune`` recomputes at every call."""
    attribute = name.rpartition(".")[2]
    if attribute.endswith("_orig") and attribute.removesuffix("_orig") + "_mask" in module._buffers:
        weight = attribute.removesuffix("_orig")
        raise ConfigurationError(
            f"{name} is pruned by torch.nn.utils.prune, which recomputes {weight} at every call. Make the pruning permanent "
            f"with torch.nn.utils.prune.remove(module, {weight!r}); init=dst.init.Magnitude() then keeps the non-zeros"
        )


def _parts(name: str, parameter: Tensor, owners: Sequence[tuple[str, str, nn.Module]]) -> list[SparseLayer]:
    module = owners[0][2]
    kind, shape = type(module).__name__, tuple(parameter.shape)
    if isinstance(module, nn.MultiheadAttention) and name.endswith("in_proj_weight"):
        return _packed(name, kind, shape)
    known = isinstance(module, (*_WEIGHT_MODULES, *_RECURRENT, *_EMBEDDINGS)) or is_conv1d(module)
    output_dim = 1 if isinstance(module, _TRANSPOSED) or is_conv1d(module) else 0
    return [SparseLayer(name, name, kind, shape, output_dim=output_dim, is_oriented=known)]


def _packed(name: str, kind: str, shape: tuple[int, ...]) -> list[SparseLayer]:
    """The q, k and v parts of a weight."""
    size = shape[0] // 3
    return [
        SparseLayer(f"{name}[{part}]", name, kind, (size, *shape[1:]), (i * size, (i + 1) * size))
        for i, part in enumerate("qkv")
    ]


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the ``Conv1D`` of transformers: a linear layer whose weight is ``[inputs, outputs]``."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in type(module).__mro__
    )


def check_orientation(layers: Iterable[SparseLayer], setting: str) -> None:
    """Require layers whose output dimension is known.

    Args:
        layers: The layers.
        setting: The setting that depends on the output dimension, for the message.

    Raises:
        ConfigurationError: The output dimension of a layer is not known.
    """
    for layer in layers:
        if not layer.is_oriented:
            raise ConfigurationError(
                f"{setting} needs the output and input dimensions of {layer.label}, and {layer.kind} is not a known layer: "
                "leave it out with exclude=, or choose the unstructured pattern"
            )


def _selected(
    selectors: Sequence[Selector], names: set[str], modules: Sequence[nn.Module], used: set[Selector]
) -> bool:
    hits = [
        s
        for s in selectors
        if (
            any(n == s or fnmatch.fnmatchcase(n, s) for n in names)
            if isinstance(s, str)
            else any(
                isinstance(m, s) or (isinstance(m, SparseLinear) and issubclass(_dense_type(m), s)) for m in modules
            )
        )
    ]
    used.update(hits)
    return bool(hits)


def _dense_type(module: SparseLinear) -> type[nn.Module]:
    """The type of the dense module that a sparse one replaces."""
    if isinstance(module, (SparseConv1D, RecurrentWeight)):
        return module.dense_type
    if isinstance(module, PackedProjection):
        return nn.MultiheadAttention
    return nn.Conv2d if isinstance(module, SparseConv2d) else nn.Linear


def _reason_to_stay_dense(
    parameter: nn.Parameter,
    owners: Sequence[tuple[str, str, nn.Module]],
    included: bool | None,
    excluded: bool,
) -> str | None:
    """Why the weight stays dense, or ``None`` if it becomes sparse."""
    modules = [module for _, _, module in owners]
    if excluded:
        return "excluded"
    if included is False:
        return "not included"
    if not parameter.requires_grad:
        return "frozen (requires_grad=False)"
    if parameter.numel() == 0:
        return "empty"
    if included:
        return None
    if all(full.rpartition(".")[2].startswith("bias") for full, _, _ in owners):
        return "bias"
    if any(isinstance(m, _EMBEDDINGS) for m in modules):
        return "embedding" if len(modules) == 1 else "tied to an embedding"
    if any(_is_gain(full, module) for full, _, module in owners):
        return "gain of weight_norm"
    if any(isinstance(m, (*_WEIGHT_MODULES, *_RECURRENT, SparseLinear)) or is_conv1d(m) for m in modules):
        return None
    return f"{type(modules[0]).__name__} is not a known layer (use include= to make it sparse)"
