"""Multiply-accumulates of PyTorch's own layers and of sparse layers, from the shapes of a call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from dst.nn import SparseLinear

_FREE_WEIGHTS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)


def rule_weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The weights that `module_operations` counts; empty for modules that it does not know."""
    if isinstance(module, (nn.Linear, nn.Bilinear, _ConvNd)):
        return [("weight", module.weight)]
    if isinstance(module, SparseLinear):
        return [("values", module.values)]
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        inner = [(name, getattr(module, name)) for name in names if getattr(module, name) is not None]
        return [*inner, ("out_proj.weight", module.out_proj.weight)]
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return [(n, w) for n, w in module.named_parameters(recurse=False) if n.startswith("weight")]
    if isinstance(module, _FREE_WEIGHTS):
        return list(module.named_parameters(recurse=False))
    return []


def module_operations(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Iterator[tuple[str, Tensor, int, int]]:
    """Yield part, weight, MACs and outputs of one call of ``module``, without its children, over the whole batch."""

    def used(weight: Tensor, positions: int, part: str = "") -> tuple[str, Tensor, int, int]:
        share = 3 if part else 1
        return part, weight, weight.numel() // share * positions, weight.shape[0] // share * positions

    if isinstance(module, (nn.Linear, nn.Bilinear)):
        yield used(module.weight, output.numel() // module.out_features)
    elif isinstance(module, SparseLinear):
        yield "", module.values, module.nnz * (output.numel() // max(1, module.out_features)), output.numel()
    elif isinstance(module, _ConvTransposeNd):
        inputs = _named(("input",), args, kwargs)["input"]
        macs = module.weight.numel() * (inputs.numel() // module.in_channels)
        yield "", module.weight, macs, output.numel()
    elif isinstance(module, _ConvNd):
        yield used(module.weight, output.numel() // module.out_channels)
    elif isinstance(module, nn.MultiheadAttention):
        call = _named(("query", "key", "value"), args, kwargs)
        queries = call["query"].numel() // module.embed_dim
        keys, values = call["key"].numel() // module.kdim, call["value"].numel() // module.vdim
        if module.in_proj_weight is not None:
            for part, tokens in (("q", queries), ("k", keys), ("v", values)):
                yield used(module.in_proj_weight, tokens, part)
        else:
            yield used(module.q_proj_weight, queries)
            yield used(module.k_proj_weight, keys)
            yield used(module.v_proj_weight, values)
        # The output projection is applied without calling its module.
        yield used(module.out_proj.weight, queries)
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        # `.data` is the tensor itself or, in a PackedSequence, its tokens without padding.
        tokens = _named(("input",), args, kwargs)["input"].data.numel() // module.input_size
        for _, weight in rule_weights(module):
            yield used(weight, tokens)
    else:
        yield from (("", weight, 0, 0) for _, weight in rule_weights(module))


def attention_products(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    """MACs of the scores and of the weighted sum: every query meets every key, over all of ``embed_dim``."""
    call = _named(("query", "key", "value"), args, kwargs)
    key = call["key"]
    length = key.shape[1] if module.batch_first and key.ndim == 3 else key.shape[0]
    length += (module.bias_k is not None) + module.add_zero_attn
    macs = call["query"].numel() * length
    return {"q·k": macs, "attn·v": macs}


def _named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(names, args, strict=False)) | kwargs
