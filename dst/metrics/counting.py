"""Counts the operations of a model: multiply-accumulates (MACs) per weight, products of activations, unknown operators.

PyTorch's own layers and sparse layers are counted from the shapes of their calls. Everything else is counted operator by
operator: a functional call belongs to the parameter that it reads, a product of two activations gets an entry of its own,
and an operator of unknown cost is listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dst.errors import ConfigurationError
from dst.metrics.module_rules import attention_products, module_operations, rule_weights
from dst.metrics.passes import Example, forward_arguments, undisturbed
from dst.nn import SparseLinear

_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.RMSNorm,
)

# Operators that no convention counts, in addition to views and to those that PyTorch tags as pointwise or reduction.
_FREE_NAMES = """
_adaptive_avg_pool2d _adaptive_avg_pool3d _assert_async _batch_norm_impl_index _embedding_bag
_embedding_bag_forward_only _fused_rms_norm _local_scalar_dense _log_softmax _native_batch_norm_legit
_native_batch_norm_legit_no_training _pack_padded_sequence _pad_packed_sequence _prelu_kernel _reshape_alias
_safe_softmax _softmax _to_copy _unique2 _unsafe_index _unsafe_view _weight_norm _weight_norm_interface
adaptive_avg_pool1d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d alias_copy aminmax arange argsort
avg_pool1d avg_pool2d avg_pool3d batch_norm bernoulli bucketize cat channel_shuffle clone col2im constant_pad_nd
contiguous copy cudnn_batch_norm cumprod cumsum dropout embedding empty empty_like empty_permuted empty_strided
equal eye fill flip full full_like gather glu histc im2col index index_put index_select is_nonzero isin item
kthvalue lift lift_fresh_copy linalg_vector_norm linspace log_softmax logcumsumexp masked_select max
max_pool2d_with_indices max_pool3d_with_indices median min mode native_batch_norm native_dropout
native_dropout_backward native_group_norm native_layer_norm new_empty new_empty_strided new_full new_ones new_zeros
nll_loss2d_forward nll_loss_forward nonzero norm normal one_hot ones ones_like pixel_shuffle pixel_unshuffle prelu
rand rand_like randint randint_like randn randn_like randperm reflection_pad1d reflection_pad2d repeat
repeat_interleave replication_pad1d replication_pad2d resize rms_norm roll rrelu_with_noise scalar_tensor scatter
scatter_add searchsorted set softmax sort stack std std_correction std_mean take topk tril tril_indices triu
triu_indices unfold_copy uniform unique_dim upsample_bicubic2d upsample_bilinear2d upsample_linear1d
upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d var var_mean zero zeros zeros_like
"""
_FREE = frozenset(_FREE_NAMES.split())


@dataclass(frozen=True)
class WeightOperations:
    """Operations of one weight tensor for one sample.

    Attributes:
        label: Name of the parameter; for a part of one, with the part in brackets (``attn.in_proj_weight[q]``).
        parameter: Name in ``model.named_parameters()``.
        weights: Number of weights.
        macs: Multiply-accumulates of the dense weight.
        outputs: Number of values computed, each a sum over inputs.
    """

    label: str
    parameter: str
    weights: int
    macs: int
    outputs: int


@dataclass(frozen=True)
class Operations:
    """Operations of a model for one sample.

    Attributes:
        weights: Weights of PyTorch's own layers, and parameters of functional products, in the order of the model.
        products: MACs of products without parameters, which no mask makes cheaper. Keys of attention are ``module: q·k``
            and ``module: attn·v``; others hold the name of the module and the operator.
        unknown: Operators of unknown cost, by module, and how often they ran. No total includes them.
        unread: Parameters that no operator read, because their module did not run or computes outside PyTorch. No total
            includes them.
    """

    weights: tuple[WeightOperations, ...]
    products: Mapping[str, int]
    unknown: Mapping[str, int]
    unread: tuple[str, ...]

    @property
    def macs(self) -> dict[str, int]:
        """Parameter name -> MACs per sample of the dense parameter."""
        totals: dict[str, int] = {}
        for weight in self.weights:
            totals[weight.parameter] = totals.get(weight.parameter, 0) + weight.macs
        return totals

    def warnings(self) -> list[str]:
        """Describe what no total includes; empty if everything was counted."""
        lines = [f"{name} ran {n}× and is not counted: its cost is unknown" for name, n in self.unknown.items()]
        return lines + [f"{name} was read by no operator and is not counted" for name in self.unread]


def count_operations(model: nn.Module, example: Example, *, batch_size: int | None = None) -> Operations:
    """Count the operations of ``model`` for one sample, by running an example.

    The model runs in evaluation mode without gradients. Its training flags, its buffers and the random generators are
    restored. It may be on any device, ``meta`` included. A weight is used once per *position*: per row of the output in
    linear layers, per output pixel in convolutions, per input pixel in transposed convolutions, per token in attention
    projections and recurrent layers. Repeated calls of a module and uses of a shared weight add up. Norms and embeddings
    cost 0. Attention scores are counted in full, even if a causal mask hides half of them.

    Args:
        model: Any module. Linear, Bilinear, Conv1-3d, ConvTranspose1-3d, MultiheadAttention, RNN, LSTM, GRU and their
            cells are counted from shapes, and so are the layers of `dst.nn` that store only non-zeros, by their number;
            other products from operators.
        example: Shape of one sample without the batch dimension, for which a floating-point sample of zeros is run; or a
            batched tensor; or the positional arguments of ``forward`` as a sequence; or its keyword arguments as a
            mapping. Tensors are moved to the device of the model.
        batch_size: Number of samples in ``example``. Default: the leading dimension of the first tensor.

    Returns:
        The operations per sample.

    Raises:
        ConfigurationError: If the model has lazy parameters, or if the number of samples is unknown or does not divide
            the counts.
    """
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ConfigurationError(f"parameter {lazy[0]} has no shape yet; run one batch through the model first")
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    args, kwargs = forward_arguments(example, first)
    samples = _count_samples([*args, *kwargs.values()], batch_size)
    tally = _Tally(model)
    with undisturbed(model, first.device), ExitStack() as stack:
        # Fused attention is a single operator that hides its two products.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for name, module in model.named_modules():
            for handle in tally.watch(name, module):
                stack.callback(handle.remove)
        stack.enter_context(_Watcher(tally))
        model(*args, **kwargs)
    return tally.result(samples)


def layer_macs(model: nn.Module, example: Example, *, batch_size: int | None = None) -> dict[str, int]:
    """Count the MACs per sample of every weight. `count_operations` returns all other operations too.

    Args:
        model: As in `count_operations`.
        example: As in `count_operations`.
        batch_size: As in `count_operations`.

    Returns:
        Name in ``model.named_parameters()`` -> MACs per sample, in that order.

    Raises:
        ConfigurationError: As `count_operations`.
    """
    return count_operations(model, example, batch_size=batch_size).macs


@dataclass
class _Frame:
    """A running module, the parameters counted from its shapes, and the number of products that cover them (None: all)."""

    name: str
    module: nn.Module | None
    covered: frozenset[str]
    products: int | None

    @property
    def hides_operators(self) -> bool:
        """Whether shapes account for all operators of the module."""
        return isinstance(self.module, _NORMS) or (bool(self.covered) and self.products is None)

    def takes(self) -> bool:
        """Whether shapes account for one more product of the module; uses it up."""
        if not self.covered or self.products == 0:
            return False
        if self.products is not None:
            self.products -= 1
        return True


class _Tally:
    """Counts so far, over the whole batch."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.sizes = {name: p.numel() for name, p in model.named_parameters()}
        self.storages = {_storage(p): name for name, p in model.named_parameters() if p.numel()}
        self.storages.pop(None, None)
        self.order = {name: i for i, name in enumerate(self.sizes)}
        self.weights: dict[str, list[Any]] = {}  # label -> parameter, weights, MACs, outputs
        self.products: dict[str, int] = {}
        self.unknown: dict[str, int] = {}
        self.read: set[str] = set()
        self.running: list[_Frame] = []

    def watch(self, name: str, module: nn.Module) -> list[Any]:
        """Hook a module: operators learn where they run, and known modules are counted from their shapes."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            weights = [weight for _, weight in rule_weights(module)]
            covered = frozenset(self.names[id(w)] for w in weights if id(w) in self.names)
            # A reparametrized weight is computed, not a parameter: its product is counted as an operator.
            known = bool(weights) and all(id(w) in self.names for w in weights)
            one = isinstance(module, (nn.Linear, _ConvNd, SparseLinear))
            self.running.append(_Frame(name, module, covered if known else frozenset(), 1 if one else None))

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not self.running.pop().covered:
                return
            for part, weight, macs, outputs in module_operations(module, args, kwargs, output):
                parameter = self.names[id(weight)]
                self.read.add(parameter)
                size = weight.numel() // (3 if part else 1)
                self.add_weight(parameter + (f"[{part}]" if part else ""), parameter, size, macs, outputs)
            if isinstance(module, nn.MultiheadAttention):
                for what, macs in attention_products(module, args, kwargs).items():
                    key = f"{name}: {what}" if name else what
                    self.products[key] = self.products.get(key, 0) + macs

        return [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True, prepend=True),
        ]

    def add_weight(self, label: str, parameter: str, weights: int, macs: int, outputs: int) -> None:
        entry = self.weights.setdefault(label, [parameter, weights, 0, 0])
        entry[2] += macs
        entry[3] += outputs

    def operator(self, packet: Any, free: bool, args: Any, kwargs: Any, output: Any) -> None:
        """Count an operator that is not a view."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and (name := self.storages.get(_storage(leaf))) is not None:
                self.read.add(name)
        frame = self.running[-1] if self.running else _Frame("", None, frozenset(), None)
        where = f" in {frame.name}" if frame.name else ""
        if packet in flop_registry:
            # The first argument of these is a bias, which is not a factor of the product.
            added = packet.__name__ in ("addmm", "baddbmm")
            factors = [self.storages.get(_storage(t)) for t in args[added : added + 2] if isinstance(t, Tensor)]
            foreign = [name for name in factors if name is not None and name not in frame.covered]
            if not foreign and frame.takes():
                return  # counted from the module's shapes
            macs = flop_registry[packet](*args, **kwargs, out_val=output) // 2
            if foreign:
                outputs = sum(t.numel() for t in tree_leaves(output) if isinstance(t, Tensor))
                self.add_weight(foreign[0], foreign[0], self.sizes[foreign[0]], macs, outputs)
            else:
                key = f"{frame.name}: {packet.__name__}" if frame.name else packet.__name__
                self.products[key] = self.products.get(key, 0) + macs
        elif not free and not frame.hides_operators:
            self.unknown[f"{packet}{where}"] = self.unknown.get(f"{packet}{where}", 0) + 1

    def result(self, samples: int) -> Operations:
        for label, (_, _, macs, _) in self.weights.items():
            _check_divisible(label, macs, samples)
        for label, macs in self.products.items():
            _check_divisible(label, macs, samples)
        weights = (
            WeightOperations(label, parameter, size, macs // samples, outputs // samples)
            for label, (parameter, size, macs, outputs) in self.weights.items()
        )
        return Operations(
            tuple(sorted(weights, key=lambda w: self.order[w.parameter])),
            {name: macs // samples for name, macs in self.products.items()},
            self.unknown,
            tuple(name for name, size in self.sizes.items() if size and name not in self.read),
        )


class _Watcher(TorchDispatchMode):
    def __init__(self, tally: _Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not func.is_view:
            self.tally.operator(func._overloadpacket, _is_free(func), args, kwargs, output)
        return output


@cache
def _is_free(operator: Any) -> bool:
    """Whether no convention counts the operator."""
    if operator.namespace not in ("aten", "prim", "prims"):
        return False
    packet = operator._overloadpacket
    name = packet.__name__.removesuffix("_")
    # In-place variants lack some tags of their originals.
    original = getattr(torch.ops.aten, name, packet) if name else packet
    overloads = [operator, *(getattr(original, overload) for overload in original.overloads())]
    tagged = any(tag.name in ("pointwise", "reduction") for overload in overloads for tag in overload.tags)
    return tagged or name in _FREE


def _storage(tensor: Tensor) -> int | None:
    """Identity of the memory of a tensor, on meta devices too; None for sparse layouts, which have none."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def _check_divisible(name: str, macs: int, samples: int) -> None:
    if macs % samples:
        raise ConfigurationError(
            f"the MACs of {name} ({macs}) are not a multiple of the {samples} samples in the "
            "example's leading dimension; pass the true batch_size"
        )


def _count_samples(values: list[Any], batch_size: int | None) -> int:
    leading = next((value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim), 0)
    samples = leading if batch_size is None else batch_size
    if samples < 1:
        raise ConfigurationError("the example holds no sample: pass a batched tensor, or batch_size of at least 1")
    return samples
