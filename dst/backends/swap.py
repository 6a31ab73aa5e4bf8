"""Swapping dense modules for sparse ones and back: which can be, and what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from dst.backends.servable import sizes_of_padding
from dst.errors import ConfigurationError
from dst.nn import FeatureMajorLinear, SparseConv2d, SparseLinear
from dst.nn.layout import choose_layouts
from dst.topology.seeding import folded_generator

Dense: TypeAlias = nn.Linear | nn.Conv2d
"""Modules that may become sparse ones."""


_HOOKS = tuple(name for name in nn.Module().__dict__ if name.endswith("_hooks") and "state_dict" not in name)


def exchange(model: nn.Module, swapped: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put modules in the places of others, and make the dense linear layers beside sparse ones feature-major.

    Args:
        model: Changed in place.
        swapped: Old module to new one.

    Returns:
        The model: a new one where it is itself among the old.
    """
    if not swapped:
        return model
    model = replace(model, swapped)
    modules = list(model.modules())
    beside: dict[nn.Module, nn.Module] = {}
    if any(isinstance(module, SparseLinear) for module in modules):
        # Dense layers take activations as sparse ones leave them.
        beside = {m: FeatureMajorLinear.from_linear(m) for m in modules if type(m) is nn.Linear}
    else:
        beside = {m: m.to_linear() for m in modules if type(m) is FeatureMajorLinear}
    _guard_save_pretrained(model, any(isinstance(module, SparseLinear) for module in modules))
    model = replace(model, beside)
    choose_layouts(model)
    return model


def _guard_save_pretrained(model: nn.Module, stores_non_zeros: bool) -> None:
    """Let a Hugging Face model refuse to write a file that ``from_pretrained`` would fill up with random weights."""
    if not hasattr(type(model), "save_pretrained"):
        return
    if stores_non_zeros:
        model.__dict__["save_pretrained"] = _refuse_to_save
    else:
        model.__dict__.pop("save_pretrained", None)


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise ConfigurationError(
        "this model stores only its non-zeros, under names that from_pretrained does not know: turn it back by "
        "dst.to_dense(model) first, or save a copy that was"
    )


def replace(model: nn.Module, swapped: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put modules in the places of others, wherever they stand; see ``exchange``."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and child in swapped:
                module._modules[name] = swapped[child]
    return swapped.get(model, model)


def sparse_module(label: str, dense: nn.Module, positions: Tensor, seed: int) -> SparseLinear:
    """Make a sparse layer of some weights of a dense one, which is left as it is.

    Args:
        label: The layer's name, of which values are drawn where the dense weight is on the meta device.
        dense: One that ``is_servable``.
        positions: Sorted row-major positions of the weights.
        seed: Kept as ``pattern_seed``.
    """
    assert isinstance(dense, (nn.Linear, nn.Conv2d))
    weight, bias, on_meta = dense.weight, dense.bias, dense.weight.device.type == "meta"
    values = None if on_meta else weight.detach().reshape(-1)[positions]
    options: dict[str, Any] = {
        "bias": bias is not None,
        "dtype": weight.dtype,
        "generator": folded_generator(seed, "values", label),
    }
    outputs, inputs = weight.shape[:2]
    if isinstance(dense, nn.Conv2d):
        padding = sizes_of_padding(dense)
        assert padding is not None
        sparse: SparseLinear = SparseConv2d(
            inputs,
            outputs,
            positions,
            values,
            kernel_size=two(dense.kernel_size),
            stride=two(dense.stride),
            padding=padding,
            dilation=two(dense.dilation),
            **options,
        )
    else:
        sparse = SparseLinear(inputs, outputs, positions, values, **options)
    if bias is not None and sparse.bias is not None:
        if not on_meta:
            sparse.bias.detach().copy_(bias.detach())
        sparse.bias.requires_grad_(bias.requires_grad)
    for name in _HOOKS:
        sparse.__dict__[name] = dense.__dict__[name]
    sparse.pattern_seed = seed
    return sparse.train(dense.training)


def two(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Height and width."""
    down, across = sizes
    return down, across


def dense_module(sparse: SparseLinear) -> Dense:
    """Make a dense layer with the weights and hooks of a sparse one, zeros elsewhere."""
    dense = sparse.to_conv() if isinstance(sparse, SparseConv2d) else sparse.to_linear()
    dense.weight.requires_grad_(sparse.values.requires_grad)
    if dense.bias is not None and sparse.bias is not None:
        dense.bias.requires_grad_(sparse.bias.requires_grad)
    for name in _HOOKS:
        dense.__dict__[name] = sparse.__dict__[name]
    return dense
