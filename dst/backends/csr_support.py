"""Which layers the csr backend supports."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dst.nn import FeatureMajorLinear
from dst.topology.layers import SparseLayer, is_conv1d, sparse_modules

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unsupported_reasons(model: nn.Module, layers: Sequence[SparseLayer]) -> dict[str, str | None]:
    """Why the csr backend does not support layers.

    Args:
        model: The model.
        layers: Its sparse layers.

    Returns:
        Layer label to the reason, or ``None`` if the layer is supported.
    """
    owners, named, stored = owners_of(model), dict(model.named_parameters()), sparse_modules(model)
    reasons = {
        layer.label: None
        if layer.parameter in stored
        else _unsupported_reason(layer, named[layer.parameter], owners[layer.parameter])
        for layer in layers
    }
    names = {parameter: name for name, parameter in named.items()}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            inner = [x.label for x in layers if named.get(x.parameter) is module.in_proj_weight]
            reason = next((why for label in inner if (why := reasons[label])), _unsupported_attention(module))
            if reason is None and len(inner) < 3:
                reason = "q, k and v are stored together, and not all of them are sparse"
            held = {names[parameter] for parameter in module.parameters()}
            reasons.update((x.label, reasons[x.label] or reason) for x in layers if x.parameter in held)
    return reasons


def _unsupported_attention(module: nn.MultiheadAttention) -> str | None:
    """What an attention module has that its sparse counterpart does not support, or ``None``."""
    if type(module) is not nn.MultiheadAttention:
        return f"{type(module).__name__} has no csr kernel"
    if not module._qkv_same_embed_dim:
        return "attention with kdim or vdim is not supported by csr; use nn.Linear projections"
    if module.bias_k is not None or module.add_zero_attn:
        return "attention with add_bias_kv or add_zero_attn is not supported by csr"
    return None


def _unsupported_reason(layer: SparseLayer, weight: Tensor, owners: Sequence[nn.Module]) -> str | None:
    """Why the csr backend does not support a dense layer, or ``None``."""
    first = owners[0]
    if isinstance(first, nn.RNNBase) and (reason := _unsupported_recurrent(first)) is not None:
        return reason
    is_attention = type(first) in (nn.MultiheadAttention, NonDynamicallyQuantizableLinear)
    if is_attention and all(type(m) is type(first) for m in owners):
        pass  # judged with its module
    elif isinstance(first, nn.RNNBase) and all(isinstance(m, nn.RNNBase) for m in owners):
        pass
    elif not all(is_supported(m) for m in owners) or layer.parameter.rpartition(".")[2] != "weight":
        if isinstance(first, nn.Conv2d):
            return f"{_unsupported_convolution(first)} convolution has no csr kernel"
        return f"{layer.kind} has no csr kernel"
    if len({id(module) for module in owners}) > 1:
        return "tied weights"
    if weight.device.type not in ("cpu", "meta"):
        return f"on {weight.device.type}; csr computes on the CPU"
    if weight.dtype not in _DTYPES:
        return f"dtype {weight.dtype}"
    return None


def _unsupported_recurrent(module: nn.RNNBase) -> str | None:
    """What a recurrent module has that its sparse counterpart does not support, or ``None``."""
    if type(module) not in (nn.LSTM, nn.GRU) or any(
        name not in module._parameters for name in module._flat_weights_names
    ):
        return f"{type(module).__name__} has no csr kernel"
    return "an LSTM with proj_size is not supported by csr" if module.proj_size else None


def is_supported(module: nn.Module) -> bool:
    """Whether a dense module has a sparse counterpart: a linear layer, transformers' Conv1D, or an ungrouped convolution."""
    if type(module) is nn.Conv2d:
        return _unsupported_convolution(module) is None
    # Subclasses may use their weight differently.
    return type(module) in (nn.Linear, FeatureMajorLinear) or (type(module).__name__ == "Conv1D" and is_conv1d(module))


def _unsupported_convolution(module: nn.Conv2d) -> str | None:
    """What a convolution has that no kernel supports, or ``None``."""
    if module.groups > 1:
        return "a depthwise" if module.groups == module.in_channels else "a grouped"
    if module.padding_mode != "zeros":
        return f"a {module.padding_mode}-padded"
    if sizes_of_padding(module) is None:
        return "an unevenly padded"
    return None if type(module) is nn.Conv2d else f"a {type(module).__name__}"


def sizes_of_padding(module: nn.Conv2d) -> tuple[int, int] | None:
    """The zeros that a convolution adds at each side, in height and width; ``None`` where both sides differ."""
    if module.padding == "valid":
        return 0, 0
    if module.padding == "same":
        down, across = (d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
        return None if down % 2 or across % 2 else (down // 2, across // 2)
    assert not isinstance(module.padding, str)
    down, across = module.padding
    return down, across


def owners_of(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Map each parameter name to the modules that hold the parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    owners: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        for _, parameter in module.named_parameters(recurse=False):
            owners.setdefault(names[id(parameter)], []).append(module)
    return owners
