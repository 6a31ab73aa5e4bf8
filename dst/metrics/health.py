r"""Whether a topology carries signal: dead units, collapsed layers, connections that lie on no path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dst.errors import ConfigurationError
from dst.metrics.passes import Example, forward_arguments, unfused_evaluation
from dst.metrics.topology import as_masks, ratio


def dead_outputs(mask: Tensor, output_dim: int = 0) -> Tensor:
    r"""Outputs without an active weight. They are constant.

    .. math:: \mathrm{dead}_o = [\, \sum_i M_{oi} = 0 \,]

    Args:
        mask: Bool tensor of shape (out, in, ...).
        output_dim: Dimension of the outputs; 1 for transposed convolutions.

    Returns:
        Bool tensor of shape (out,).

    Raises:
        ConfigurationError: If the mask is not a bool tensor, or has fewer than two dimensions.

    Example:
        >>> import torch
        >>> from dst.metrics import dead_outputs
        >>> dead_outputs(torch.tensor([[True, False], [False, False], [True, False]]))
        tensor([False,  True, False])
    """
    return ~_channels(mask, output_dim).any(1)


def dead_inputs(mask: Tensor, output_dim: int = 0, groups: int = 1) -> Tensor:
    r"""Inputs without an active weight. The layer ignores them.

    .. math:: \mathrm{dead}_i = [\, \sum_o M_{oi} = 0 \,]

    Args:
        mask: Bool tensor of shape (out, in / groups, ...), or (in, out / groups, ...) if ``output_dim`` is 1.
        output_dim: Dimension of the outputs; 1 for transposed convolutions.
        groups: Groups of a convolution. Each output reads the inputs of its own group alone.

    Returns:
        Bool tensor of shape (in,).

    Raises:
        ConfigurationError: If the mask is not a bool tensor, has fewer than two dimensions, or does not divide into
            groups.

    Example:
        >>> import torch
        >>> from dst.metrics import dead_inputs
        >>> dead_inputs(torch.tensor([[True, False], [False, False], [True, False]]))
        tensor([False,  True])
    """
    connected = _channels(mask, output_dim)
    if output_dim == 1:
        return ~connected.any(0)  # rows are outputs of a group, columns all inputs
    if connected.shape[0] % groups:
        raise ConfigurationError(f"{connected.shape[0]} outputs do not divide into {groups} groups")
    return ~connected.unflatten(0, (groups, -1)).any(1).flatten()


def collapsed_layers(masks: Mapping[str, Tensor]) -> list[str]:
    r"""Layers without an active weight. No signal passes through them.

    .. math:: \{ l : |M_l| = 0 \}

    Args:
        masks: Name -> bool tensor.

    Returns:
        Names of the layers, in the order of ``masks``.

    Raises:
        ConfigurationError: If a mask is not a bool tensor.

    Example:
        >>> import torch
        >>> from dst.metrics import collapsed_layers
        >>> collapsed_layers({"a": torch.tensor([True, False]), "b": torch.tensor([False, False])})
        ['b']
    """
    as_masks(masks)
    return [name for name, mask in masks.items() if not bool(mask.any())]


def chain_effective_masks(masks: Sequence[Tensor]) -> list[Tensor]:
    r"""Connections of a chain of layers that lie on a path from an input to an output.

    .. math:: E_l = M_l \odot a_l a_{l-1}^\top, \qquad
        a_l = \mathrm{fed}_l \wedge \mathrm{read}_l

    A unit is *fed* if a connection leads to it from a fed unit; all inputs are fed. It is *read* if a connection leads from
    it to a read unit; all outputs are read. The units of convolutions are channels. Between a convolution and a linear
    layer a channel may stand for several features, channels first, in the order of ``flatten``.

    Args:
        masks: Bool tensors of shape (out, in, ...), from input to output; all True for dense layers in between. For
            networks with skip connections use `effective_masks`.

    Returns:
        Masks of the effective connections, of the same shapes.

    Raises:
        ConfigurationError: If a mask is not a bool tensor, or the sizes of consecutive layers do not fit.

    Example:
        >>> import torch
        >>> from dst.metrics import chain_effective_masks
        >>> first = torch.tensor([[True, False], [False, True]])
        >>> second = torch.tensor([[True, False]])
        >>> chain_effective_masks([first, second])[0]
        tensor([[ True, False],
                [False, False]])
    """
    tensors = as_masks(masks)
    channels = [_channels(mask, 0) for mask in tensors]
    for i, (before, after) in enumerate(pairwise(channels)):
        if before.shape[0] == 0 or after.shape[1] % before.shape[0]:
            raise ConfigurationError(
                f"layer {i + 1} has {after.shape[1]} inputs, which does not follow upon {before.shape[0]} outputs"
            )
    spread = [1, *(b.shape[1] // a.shape[0] for a, b in pairwise(channels))]
    fed = [channels[0].new_ones(channels[0].shape[1])]
    for layer, repeat in zip(channels[:-1], spread[1:], strict=True):
        fed.append((layer & fed[-1]).any(1).repeat_interleave(repeat))
    read = [channels[-1].new_ones(channels[-1].shape[0])]
    for layer, repeat in zip(channels[:0:-1], spread[:0:-1], strict=True):
        read.append((layer & read[-1][:, None]).any(0).unflatten(0, (-1, repeat)).any(1))
    effective = []
    for mask, inputs, outputs in zip(tensors, fed, reversed(read), strict=True):
        on_path = outputs[:, None] & inputs
        effective.append(mask & on_path.reshape(*on_path.shape, *[1] * (mask.ndim - 2)))
    return effective


def chain_effective_counts(masks: Sequence[Tensor]) -> tuple[int, int]:
    """Number of effective connections and of all weights; see `effective_density`."""
    return sum(int(e.sum()) for e in chain_effective_masks(masks)), sum(m.numel() for m in masks)


def effective_density(masks: Sequence[Tensor]) -> Tensor:
    r"""Share of the weights of a chain of layers that lie on a path from an input to an output.

    .. math:: d_\mathrm{eff} = \frac{\sum_l |E_l|}{\sum_l N_l} \le d

    with E as in `chain_effective_masks`. Source: Vysogorets & Kempe 2021, "Connectivity Matters: Neural Network Pruning
    Through the Lens of Effective Sparsity", https://arxiv.org/abs/2107.02306.

    Args:
        masks: As in `chain_effective_masks`. For other networks use `mask_density` of `effective_masks`.

    Returns:
        Scalar in [0, 1], at most the density.

    Raises:
        ConfigurationError: As `chain_effective_masks`.

    Example:
        >>> import torch
        >>> from dst.metrics import effective_density
        >>> effective_density([torch.tensor([[True, False], [False, True]]), torch.tensor([[True, False]])])
        tensor(0.3333)
    """
    return ratio(*chain_effective_counts(masks))


def effective_masks(
    model: nn.Module, masks: Mapping[str, Tensor], example: Example, *, seed: int = 0
) -> dict[str, Tensor]:
    r"""Connections of any network that lie on a path from its inputs to its outputs, found by autograd.

    .. math:: E_l = M_l \odot \Bigl[\, \frac{\partial}{\partial W_l} \langle u, f(x; W) \rangle \ne 0 \,\Bigr]

    W are random positive weights on the masks, x random positive inputs and u a random direction. The derivative is a sum
    over paths, and zero if there is none. Rectifiers become the identity and maxima become means, so that values do not
    block a path. Biases are zero, and normalizations use their initial statistics. Skip connections, branches and shared
    weights are followed. Layer normalization and softmax mix their inputs, so paths lead through them from every input to
    every output.

    Args:
        model: The network. It is run once, in float64, and not changed.
        masks: Parameter name -> bool tensor of the shape of the parameter.
        example: As in `dst.metrics.count_operations`. Recurrent weights need at least two tokens.
        seed: Seed of the random numbers.

    Returns:
        Masks of the effective connections, by parameter name.

    Raises:
        ConfigurationError: If a mask fits no parameter, or no output depends on the masked parameters.

    Example:
        >>> import torch
        >>> from dst.metrics import effective_masks, mask_density
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> masks = {"0.weight": torch.tensor([[True, False], [False, True]]), "2.weight": torch.tensor([[True, False]])}
        >>> mask_density(effective_masks(model, masks, (2,)))
        tensor(0.3333)
    """
    as_masks(masks)
    named = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in named or named[name].shape != mask.shape:
            found = tuple(named[name].shape) if name in named else "no such parameter"
            raise ConfigurationError(f"the mask of {name} has shape {tuple(mask.shape)}, the model {found}")
    generator = torch.Generator().manual_seed(seed)
    values = _path_values(model, masks, generator)
    args, kwargs = forward_arguments(example, torch.empty(0, dtype=torch.float64))
    args = tuple(_positive(value, generator) for value in args)
    kwargs = {name: _positive(value, generator) for name, value in kwargs.items()}
    wanted = {name: values[name] for name in masks}
    with unfused_evaluation(model), torch.enable_grad(), _Passing():
        output = functional_call(model, values, args, kwargs)
        leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if not leaves:
            raise ConfigurationError(f"no output of {type(model).__name__} depends on its sparse weights")
        total = torch.stack([(t * _uniform(t.shape, generator)).sum() for t in leaves]).sum()
    gradients = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(mask) if gradient is None else mask & (gradient != 0).to(mask.device)
        for (name, mask), gradient in zip(masks.items(), gradients, strict=True)
    }


def _channels(mask: Tensor, output_dim: int) -> Tensor:
    """Whether each output is connected to each input: bool of shape (out, in), reduced over kernels."""
    (mask,) = as_masks(mask)
    if mask.ndim < 2:
        raise ConfigurationError(f"a mask of shape {tuple(mask.shape)} has no inputs and outputs")
    if output_dim not in (0, 1):
        raise ConfigurationError(f"output_dim={output_dim} must be 0 or 1")
    return mask.transpose(0, output_dim).reshape(mask.shape[output_dim], mask.shape[1 - output_dim], -1).any(2)


def _uniform(shape: Iterable[int], generator: torch.Generator) -> Tensor:
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float64) + 0.5


def _positive(value: Any, generator: torch.Generator) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return _uniform(value.shape, generator)
    return value.cpu() if isinstance(value, Tensor) else value


def _path_values(model: nn.Module, masks: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Parameters and buffers that keep activations positive on every path, and of magnitude at most about 1."""
    values: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            values[name] = parameter.detach().cpu()
            continue
        value = _uniform(parameter.shape, generator)
        if "bias" in name.rpartition(".")[2]:
            value.zero_()
        elif parameter.ndim > 1:
            value /= max(1, parameter.numel() // max(1, parameter.shape[0]))
        if name in masks:
            value *= masks[name].cpu()
        values[name] = value.requires_grad_(name in masks)
    for name, buffer in model.named_buffers():
        kind = name.rpartition(".")[2]
        value = buffer.detach().cpu().clone()
        value = value.double() if value.is_floating_point() else value
        if kind == "running_mean":
            value.zero_()
        elif kind == "running_var":
            value.fill_(1)
        values[name] = value
    return values


_RECTIFIERS = frozenset(
    {
        "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "rrelu", "hardtanh", "hardtanh_", "threshold", "threshold_",
        "hardswish", "hardsigmoid", "hardshrink", "softshrink",
    }
)  # fmt: skip
_MAXIMA: dict[str, Any] = {
    "max_pool1d": functional.avg_pool1d,
    "max_pool2d": functional.avg_pool2d,
    "max_pool3d": functional.avg_pool3d,
    "adaptive_max_pool1d": functional.adaptive_avg_pool1d,
    "adaptive_max_pool2d": functional.adaptive_avg_pool2d,
    "adaptive_max_pool3d": functional.adaptive_avg_pool3d,
}


class _Passing(TorchFunctionMode):
    """Replaces functions that would block paths depending on values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in _RECTIFIERS:
            return args[0] if args else kwargs["input"]
        if name in _MAXIMA and kwargs.get("dilation", 1) in (1, (1,), (1, 1), (1, 1, 1)):
            kept = {key: value for key, value in kwargs.items() if key not in ("dilation", "return_indices")}
            return _MAXIMA[name](*args[:4], **kept)
        return func(*args, **kwargs)
