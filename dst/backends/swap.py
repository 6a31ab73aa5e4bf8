"""Swapping dense modules for sparse ones and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dst.backends.csr_support import sizes_of_padding
from dst.errors import ConfigurationError
from dst.nn import (
    FeatureMajorLinear,
    PackedProjection,
    RecurrentWeight,
    SparseConv1D,
    SparseConv2d,
    SparseGRU,
    SparseLinear,
    SparseLSTM,
    SparseMultiheadAttention,
    SparseRecurrent,
)
from dst.topology.layers import is_conv1d
from dst.topology.seeding import folded_generator

_FUSED = "_dst_fused"
"""Attribute of an encoder: its setting before its fused evaluation was disabled."""

_HOOKS = tuple(name for name in nn.Module().__dict__ if name.endswith("_hooks") and "state_dict" not in name)


def exchange(model: nn.Module, swapped: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules of a model.

    Args:
        model: The model. It is changed in place.
        swapped: Old module to new module.

    Returns:
        The model. A new module if the model itself is replaced.
    """
    if not swapped:
        return model
    model = replace(model, swapped)
    modules = list(model.modules())
    _guard_save_pretrained(model, any(isinstance(module, SparseLinear) for module in modules))
    _guard_fused_encoders(modules)
    # Models that were pickled by earlier versions have feature-major layers beside sparse ones.
    return replace(model, {m: m.to_linear() for m in modules if type(m) is FeatureMajorLinear})


def _guard_save_pretrained(model: nn.Module, stores_non_zeros: bool) -> None:
    """Disable ``save_pretrained`` of a Hugging Face model: ``from_pretrained`` would replace sparse weights by random ones."""
    if not hasattr(type(model), "save_pretrained"):
        return
    if stores_non_zeros:
        model.__dict__["save_pretrained"] = _refuse_to_save
    else:
        model.__dict__.pop("save_pretrained", None)


def _guard_fused_encoders(modules: Iterable[nn.Module]) -> None:
    """Disable the fused evaluation of torch's encoders with sparse layers: it reads dense weights."""
    for module in modules:
        if isinstance(module, nn.TransformerEncoder):
            setting = "use_nested_tensor"
        elif isinstance(module, nn.TransformerEncoderLayer):
            setting = "activation_relu_or_gelu"
        else:
            continue
        if any(isinstance(inner, SparseLinear) for inner in module.modules()):
            module.__dict__.setdefault(_FUSED, module.__dict__[setting])
            module.__dict__[setting] = False
        elif _FUSED in module.__dict__:
            module.__dict__[setting] = module.__dict__.pop(_FUSED)


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise ConfigurationError(
        "this model stores only its non-zeros, under names that from_pretrained does not know: convert it, or a copy, with "
        "dst.to_dense(model) first"
    )


def replace(model: nn.Module, swapped: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules wherever they occur; see ``exchange``."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and child in swapped:
                module._modules[name] = swapped[child]
    return swapped.get(model, model)


def sparse_module(label: str, dense: nn.Module, positions: Tensor, seed: int) -> SparseLinear:
    """Create a sparse module from the weights of a dense one at some positions. The dense module is not changed.

    Args:
        label: The layer's label. Together with ``seed`` it seeds the values if the dense weight is on the meta device.
        dense: A module that ``is_supported``. Of attention, q, k and v together become a ``PackedProjection``. Of
            a recurrent module, the weight at the end of the label becomes a ``RecurrentWeight``.
        positions: Sorted row-major positions of the weights.
        seed: Stored as ``pattern_seed``.
    """
    is_recurrent, prefix = isinstance(dense, nn.RNNBase), "in_proj_" if isinstance(dense, nn.MultiheadAttention) else ""
    weight = dense.get_parameter(label.rpartition(".")[2] if is_recurrent else f"{prefix}weight")
    bias = None if is_recurrent else dense._parameters[f"{prefix}bias"]
    on_meta = weight.device.type == "meta"
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
    elif is_conv1d(dense):
        sparse = SparseConv1D(outputs, inputs, positions, values, dense_type=type(dense), **options)
    else:
        kind = PackedProjection if prefix else RecurrentWeight if is_recurrent else SparseLinear
        sparse = kind(inputs, outputs, positions, values, **options)
    if bias is not None and sparse.bias is not None:
        if not on_meta:
            sparse.bias.detach().copy_(bias.detach())
        sparse.bias.requires_grad_(bias.requires_grad)
    if not (prefix or is_recurrent):
        _move_hooks(dense, sparse)
    sparse.pattern_seed = seed
    return sparse.train(dense.training)


def sparse_attention(
    dense: nn.MultiheadAttention, in_proj: SparseLinear, out_proj: nn.Module
) -> SparseMultiheadAttention:
    """Create sparse attention from its projections, with the settings and hooks of dense attention."""
    assert isinstance(in_proj, PackedProjection)
    assert isinstance(out_proj, (nn.Linear, SparseLinear))
    options: dict[str, Any] = {"dropout": dense.dropout, "batch_first": dense.batch_first}
    sparse = SparseMultiheadAttention(in_proj, out_proj, dense.num_heads, **options)
    _move_hooks(dense, sparse)
    # Not by train(), which would also set the mode of the output projection.
    sparse.training = dense.training
    return sparse


def sparse_recurrent(dense: nn.Module, weights: Mapping[str, SparseLinear], seed: int) -> SparseRecurrent:
    """Create a sparse recurrent module, with the settings, hooks and other parameters of a dense one.

    Args:
        dense: An ``nn.LSTM`` or ``nn.GRU``.
        weights: Name in the dense module to ``RecurrentWeight``.
        seed: Seeds the biases if they are on the meta device.
    """
    assert isinstance(dense, (nn.LSTM, nn.GRU))
    parts: dict[str, Any] = {**dense._parameters, **weights}
    for name, part in parts.items():
        if name.startswith("bias") and part.device.type == "meta":
            bound, bias = dense.hidden_size**-0.5, torch.empty(part.shape, dtype=part.dtype)
            bias.uniform_(-bound, bound, generator=folded_generator(seed, "values", name))
            parts[name] = nn.Parameter(bias, part.requires_grad)
    names = ("num_layers", "bias", "batch_first", "dropout", "bidirectional")
    options: dict[str, Any] = {name: getattr(dense, name) for name in names}
    kind = SparseLSTM if isinstance(dense, nn.LSTM) else SparseGRU
    sparse = kind(dense.input_size, dense.hidden_size, parts, **options)
    _move_hooks(dense, sparse)
    sparse.training = dense.training
    return sparse


def _dense_recurrent(sparse: SparseRecurrent) -> nn.RNNBase:
    options: dict[str, Any] = {
        name: getattr(sparse, name) for name in ("num_layers", "bias", "batch_first", "bidirectional")
    }
    # On the meta device torch draws no random numbers; all parameters are replaced.
    dense = sparse.dense_type(sparse.input_size, sparse.hidden_size, dropout=sparse.dropout, device="meta", **options)
    for name in sparse.dense_names():
        part = getattr(sparse, name)
        if isinstance(part, RecurrentWeight):
            part = nn.Parameter(part.dense_weight(), part.values.requires_grad)
        setattr(dense, name, part)
    _move_hooks(sparse, dense)
    dense.training = sparse.training
    return dense


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]


def two(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Height and width."""
    down, across = sizes
    return down, across


def dense_module(sparse: SparseLinear | SparseMultiheadAttention | SparseRecurrent) -> nn.Module:
    """Create a dense module with the weights and hooks of a sparse one, and zeros elsewhere."""
    dense: nn.Module
    if isinstance(sparse, SparseMultiheadAttention):
        return _dense_attention(sparse)
    if isinstance(sparse, SparseRecurrent):
        return _dense_recurrent(sparse)
    if isinstance(sparse, SparseConv1D):
        dense = sparse.to_conv1d()
    else:
        dense = sparse.to_conv() if isinstance(sparse, SparseConv2d) else sparse.to_linear()
    dense.get_parameter("weight").requires_grad_(sparse.values.requires_grad)
    if sparse.bias is not None:
        dense.get_parameter("bias").requires_grad_(sparse.bias.requires_grad)
    _move_hooks(sparse, dense)
    return dense


def _dense_attention(sparse: SparseMultiheadAttention) -> nn.MultiheadAttention:
    inner, output = dense_module(sparse.in_proj), sparse.out_proj
    outer = dense_module(output) if isinstance(output, SparseLinear) else output
    dense = nn.MultiheadAttention(
        sparse.embed_dim,
        sparse.num_heads,
        sparse.dropout,
        bias=inner._parameters["bias"] is not None,
        batch_first=sparse.batch_first,
        dtype=sparse.in_proj.values.dtype,
    )
    dense._parameters["in_proj_weight"] = inner._parameters["weight"]
    dense._parameters["in_proj_bias"] = inner._parameters["bias"]
    dense.out_proj._parameters.update(outer._parameters)
    _move_hooks(outer, dense.out_proj)
    _move_hooks(sparse, dense)
    dense.training = sparse.training
    return dense
