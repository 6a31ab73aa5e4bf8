r"""Whether a topology still carries signal: dead units, collapsed layers, connections that lead nowhere."""

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
    r"""Which outputs no connection enters: they are constant.

    .. math:: \mathrm{dead}_o = [\, \sum_i M_{oi} = 0 \,]

    Args:
        mask: Bool tensor of shape (out, in, ...).
        output_dim: Dimension of the outputs; 1 for transposed convolutions.

    Returns:
        Bool tensor of shape (out,).

    Raises:
        ConfigurationError: The mask is no bool tensor, or has fewer than two dimensions.

    Example:
        >>> import torch
        >>> from dst.metrics import dead_outputs
        >>> dead_outputs(torch.tensor([[True, False], [False, False], [True, False]]))
        tensor([False,  True, False])
    """
    return ~_channels(mask, output_dim).any(1)


def dead_inputs(mask: Tensor, output_dim: int = 0, groups: int = 1) -> Tensor:
    r"""Which inputs no connection leaves: what they carry is lost.

    .. math:: \mathrm{dead}_i = [\, \sum_o M_{oi} = 0 \,]

    Args:
        mask: Bool tensor of shape (out, in / groups, ...), or (in, out / groups, ...) if ``output_dim`` is 1.
        output_dim: Dimension of the outputs; 1 for transposed convolutions.
        groups: Groups of a convolution: each output reads the inputs of its own group alone.

    Returns:
        Bool tensor of shape (in,).

    Raises:
        ConfigurationError: The mask is no bool tensor, has fewer than two dimensions, or does not divide into groups.

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
    r"""Layers without any connection: nothing passes, and the network's output no longer depends on its input.

    .. math:: \{ l : |M_l| = 0 \}

    Args:
        masks: Name to bool tensor.

    Returns:
        Their names, in the order given.

    Raises:
        ConfigurationError: Something that is no bool tensor.

    Example:
        >>> import torch
        >>> from dst.metrics import collapsed_layers
        >>> collapsed_layers({"a": torch.tensor([True, False]), "b": torch.tensor([False, False])})
        ['b']
    """
    as_masks(masks)
    return [name for name, mask in masks.items() if not bool(mask.any())]


def chain_effective_masks(masks: Sequence[Tensor]) -> list[Tensor]:
    r"""Connections of a chain of layers that lie on some path from an input to an output.

    .. math:: E_l = M_l \odot a_l a_{l-1}^\top, \qquad
        a_l = \mathrm{fed}_l \wedge \mathrm{read}_l

    where a unit is *fed* if a connection from a fed unit enters it (all inputs are) and *read* if one leaves it to a read
    unit (all outputs are). In convolutions units are channels. Between a convolution and a linear layer every channel may
    stand for several features (channels first, as ``flatten`` has it).

    Args:
        masks: Bool tensors of shape (out, in, ...), from input to output; dense layers in between as all True. Skip
            connections are not seen: take `effective_masks` for networks that have them.

    Returns:
        Masks of the same shapes, those of effective connections.

    Raises:
        ConfigurationError: Something that is no bool tensor, or layers that do not follow upon each other.

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
    """Effective connections, and all weights; see `effective_density`."""
    return sum(int(e.sum()) for e in chain_effective_masks(masks)), sum(m.numel() for m in masks)


def effective_density(masks: Sequence[Tensor]) -> Tensor:
    r"""Share of the weights that lie on some path from an input to an output, in a chain of layers.

    .. math:: d_\mathrm{eff} = \frac{\sum_l |E_l|}{\sum_l N_l} \le d

    with E as in `chain_effective_masks`. Source: Vysogorets & Kempe 2021, "Connectivity Matters: Neural Network Pruning
    Through the Lens of Effective Sparsity", https://arxiv.org/abs/2107.02306.

    Args:
        masks: As in `chain_effective_masks`. For other networks take `mask_density` of `effective_masks`.

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
    r"""Connections of any network that lie on some path from its inputs to its outputs, as autograd sees it.

    .. math:: E_l = M_l \odot \Bigl[\, \frac{\partial}{\partial W_l} \langle u, f(x; W) \rangle \ne 0 \,\Bigr]

    for random positive weights W on the masks, random positive inputs x and a random direction u: the derivative is a sum
    over paths, and is zero where there is none. Rectifiers let everything pass, and maxima become means, so that no path
    is blocked by the values of the moment; biases are zero, and normalisations start from their initial statistics. Skip
    connections, branches and shared weights are followed. Layer normalisation and softmax mix their inputs, so paths lead
    through them from every input to every output.

    Args:
        model: The network; it is run once, in double precision, and left as it was.
        masks: Parameter name to bool tensor of the parameter's shape.
        example: As in `dst.metrics.count_operations`. A recurrent weight takes part from the second token on.
        seed: Seeds the random numbers.

    Returns:
        Masks of the effective connections, by parameter name.

    Raises:
        ConfigurationError: A mask that fits no parameter, or a network whose output does not depend on floating-point
            parameters.

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
    """Which output is connected to which input: bool of shape (out, in), kernels reduced."""
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
    """Parameters and buffers with which activations are positive where a path leads, and of size one or less."""
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
    """Lets everything pass where the values of the moment would decide what does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in _RECTIFIERS:
            return args[0] if args else kwargs["input"]
        if name in _MAXIMA and kwargs.get("dilation", 1) in (1, (1,), (1, 1), (1, 1, 1)):
            kept = {key: value for key, value in kwargs.items() if key not in ("dilation", "return_indices")}
            return _MAXIMA[name](*args[:4], **kept)
        return func(*args, **kwargs)
