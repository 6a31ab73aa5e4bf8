"""FLOPs of inference and training as functions of the layers' densities.

Convention, that of RigL (Evci et al. 2020, "Rigging the Lottery", appendix H): a multiply-accumulate
(MAC) is two FLOPs, a layer's cost is proportional to its density, and the backward pass costs twice
the forward pass. Only weights count: biases, norms, activations, pooling, embedding look-ups and
attention scores are left out unless passed as ``extra_flops``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from dst.errors import ConfigurationError

FLOPS_PER_MAC = 2

_WEIGHTS_WITHOUT_MACS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm)


def layer_macs(
    model: nn.Module,
    example: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    batch_size: int | None = None,
) -> dict[str, int]:
    """Measure every weight's MACs per sample by running one example through ``model``.

    The model runs in eval mode without gradients; its training flags, buffers and the random
    generators end up as they were. It may live on any device, ``meta`` included. A weight is used
    once per *position*: linear layers per row of the output, convolutions per output pixel, transposed
    convolutions per input pixel, attention projections and recurrent weights per token. Modules called
    several times, and weights that several modules share, add up. Norms and embeddings cost 0.

    Args:
        model: Any module. Counted are Linear, Conv1-3d, ConvTranspose1-3d, MultiheadAttention, RNN, LSTM,
            GRU and their cells; `uncounted` lists the weights of everything else.
        example: Shape of one sample, without the batch dimension (then one floating-point sample of
            zeros is run); or a batched tensor; or the positional arguments of ``forward`` as a
            sequence; or its keyword arguments as a mapping. Tensors are moved to the model's device.
        batch_size: Number of samples in ``example``; None takes the first tensor's leading dimension.

    Returns:
        Name in ``model.named_parameters()`` -> MACs per sample, in that order, for the weights of all
        counted modules that ran.

    Raises:
        ConfigurationError: if the model has lazy parameters, or the number of samples is unknown or
            does not divide what was measured.
    """
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ConfigurationError(f"parameter {lazy[0]} has no shape yet; run one batch through the model first")
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    args, kwargs = _forward_arguments(example, first)
    samples = _count_samples([*args, *kwargs.values()], batch_size)

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    totals: dict[str, int] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for weight, macs in _module_macs(module, args, kwargs, output):
            # A reparametrised weight is computed, not a parameter: `uncounted` reports its sources.
            if id(weight) in names:
                name = names[id(weight)]
                totals[name] = totals.get(name, 0) + macs

    with _undisturbed(model, first.device), ExitStack() as hooks:
        for module in model.modules():
            hooks.callback(module.register_forward_hook(record, with_kwargs=True).remove)
        model(*args, **kwargs)

    uneven = [name for name, macs in totals.items() if macs % samples]
    if uneven:
        raise ConfigurationError(
            f"the MACs of {uneven[0]} ({totals[uneven[0]]}) are no multiple of the {samples} samples in the "
            "example's leading dimension; pass the true batch_size"
        )
    return {name: totals[name] // samples for name in names.values() if name in totals}


def uncounted(model: nn.Module, macs: Mapping[str, int]) -> list[str]:
    """List the weights that ``macs`` says nothing about, so that no layer is taken for free unnoticed.

    Args:
        model: The module that was measured.
        macs: The result of `layer_macs`.

    Returns:
        Names of the parameters with two or more dimensions that are missing in ``macs``: their modules
        are of an unsupported type, were not called, or compute their weight from the parameter.
    """
    return [name for name, p in model.named_parameters() if p.ndim >= 2 and name not in macs]


def inference_flops(macs: Mapping[str, float], densities: Mapping[str, float], extra_flops: float = 0.0) -> float:
    """FLOPs of one sample's forward pass: ``2 · Σ macs · density + extra_flops``.

    Args:
        macs: Parameter name -> MACs per sample, from `layer_macs`.
        densities: Parameter name -> density in [0, 1]; layers that are not named are dense.
        extra_flops: FLOPs per sample that density does not change, such as bias additions and ReLU.

    Returns:
        FLOPs per sample, multiplications and additions.

    Raises:
        ConfigurationError: if a density is out of range or belongs to a layer without MACs.
    """
    for name, density in densities.items():
        if name not in macs:
            raise ConfigurationError(
                f"{name} has a density but no MACs: add them to macs, or leave it out of densities"
            )
        if not 0.0 <= density <= 1.0:
            raise ConfigurationError(f"the density of {name} must lie in [0, 1], got {density!r}")
    return FLOPS_PER_MAC * sum(count * densities.get(name, 1.0) for name, count in macs.items()) + extra_flops


def inference_ratio(macs: Mapping[str, float], densities: Mapping[str, float], extra_flops: float = 0.0) -> float:
    """`inference_flops` relative to the dense network, in [0, 1].

    Args:
        macs: As in `inference_flops`.
        densities: As in `inference_flops`.
        extra_flops: As in `inference_flops`; it stays in both terms of the ratio.

    Returns:
        Sparse over dense FLOPs.

    Raises:
        ConfigurationError: as `inference_flops`, or if the dense network costs nothing.
    """
    sparse = inference_flops(macs, densities, extra_flops)
    return sparse / _dense_flops(macs, extra_flops)


def training_ratio(
    macs: Mapping[str, float],
    densities: Mapping[str, float],
    step_counts: Mapping[str, int],
    extra_flops: float = 0.0,
) -> float:
    """FLOPs of a training run relative to as many steps of the dense network.

    With f_S and f_D the sparse and dense inference FLOPs, an ordinary sparse step costs 3·f_S, a step
    that needs the gradient of every weight 2·f_S + f_D, and a dense step 3·f_D (Evci et al. 2020,
    appendix H). The run counts as having had the given densities throughout.

    Args:
        macs: As in `inference_flops`.
        densities: As in `inference_flops`.
        step_counts: Optimizer steps of the kinds "sparse", "dense_gradient", "dense"; missing kinds are 0.
        extra_flops: As in `inference_flops`.

    Returns:
        The run's FLOPs over 3·f_D per step, in [0, 1].

    Raises:
        ConfigurationError: as `inference_ratio`, or if a kind of step is unknown, a count is negative or
            there was no step at all.
    """
    f_sparse = inference_flops(macs, densities, extra_flops)
    f_dense = _dense_flops(macs, extra_flops)
    costs = {"dense": 3 * f_dense, "sparse": 3 * f_sparse, "dense_gradient": 2 * f_sparse + f_dense}
    for kind, count in step_counts.items():
        if kind not in costs:
            raise ConfigurationError(f"unknown kind of step {kind!r}; known are {', '.join(costs)}")
        if count < 0:
            raise ConfigurationError(f"the number of {kind!r} steps must not be negative, got {count}")
    steps = sum(step_counts.values())
    if steps == 0:
        raise ConfigurationError("step_counts holds no step: there is no training to measure yet")
    return sum(costs[kind] * count for kind, count in step_counts.items()) / (steps * 3 * f_dense)


def rigl_training_flops(f_sparse: float, f_dense: float, update_every: int) -> float:
    """Mean FLOPs of a RigL training step: ``(3·f_S·ΔT + 2·f_S + f_D) / (ΔT + 1)``.

    Source: Evci et al. 2020, appendix H.

    Args:
        f_sparse: Inference FLOPs f_S of the sparse network.
        f_dense: Inference FLOPs f_D of the dense network.
        update_every: Steps ΔT between two updates of the topology, at least 1.

    Returns:
        FLOPs per sample and step.

    Raises:
        ConfigurationError: if ``update_every`` is less than 1.
    """
    if update_every < 1:
        raise ConfigurationError(f"update_every must be at least 1, got {update_every}")
    return (3 * f_sparse * update_every + 2 * f_sparse + f_dense) / (update_every + 1)


def static_training_flops(f_sparse: float) -> float:
    """FLOPs of a training step that never needs a dense gradient (static masks, SET): ``3·f_S``.

    Source: Evci et al. 2020, appendix H.

    Args:
        f_sparse: Inference FLOPs f_S of the sparse network.

    Returns:
        FLOPs per sample and step.
    """
    return 3 * f_sparse


def _dense_flops(macs: Mapping[str, float], extra_flops: float) -> float:
    flops = inference_flops(macs, {}, extra_flops)
    if flops <= 0:
        raise ConfigurationError("the dense network costs no FLOPs; measure macs with layer_macs first")
    return flops


def _module_macs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Iterator[tuple[Tensor, int]]:
    """Yield each weight of ``module`` itself with the MACs of this one call, over the whole batch."""
    if isinstance(module, nn.Linear):
        yield module.weight, module.weight.numel() * (output.numel() // module.out_features)
    elif isinstance(module, _ConvTransposeNd):
        inputs = _named(("input",), args, kwargs)["input"]
        yield module.weight, module.weight.numel() * (inputs.numel() // module.in_channels)
    elif isinstance(module, _ConvNd):
        yield module.weight, module.weight.numel() * (output.numel() // module.out_channels)
    elif isinstance(module, nn.MultiheadAttention):
        call = _named(("query", "key", "value"), args, kwargs)
        queries = call["query"].numel() // module.embed_dim
        keys, values = call["key"].numel() // module.kdim, call["value"].numel() // module.vdim
        if module.in_proj_weight is not None:
            yield module.in_proj_weight, module.in_proj_weight.numel() // 3 * (queries + keys + values)
        else:
            yield module.q_proj_weight, module.q_proj_weight.numel() * queries
            yield module.k_proj_weight, module.k_proj_weight.numel() * keys
            yield module.v_proj_weight, module.v_proj_weight.numel() * values
        # The output projection is applied without calling its module.
        yield module.out_proj.weight, module.out_proj.weight.numel() * queries
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        # `.data` is the tensor itself or, in a PackedSequence, its tokens without padding.
        tokens = _named(("input",), args, kwargs)["input"].data.numel() // module.input_size
        for name, weight in module.named_parameters(recurse=False):
            if name.startswith("weight"):
                yield weight, weight.numel() * tokens
    elif isinstance(module, _WEIGHTS_WITHOUT_MACS):
        yield from ((weight, 0) for weight in module.parameters(recurse=False))


def _named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(names, args, strict=False)) | kwargs


def _forward_arguments(example: Any, like: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn an example into the arguments of ``forward``, on ``like``'s device (zeros: also of its type)."""

    def move(value: Any) -> Any:
        return value.to(like.device) if isinstance(value, Tensor) else value

    if isinstance(example, Tensor):
        return (move(example),), {}
    if isinstance(example, Mapping):
        return (), {name: move(value) for name, value in example.items()}
    if all(isinstance(size, int) for size in example):
        return (torch.zeros(1, *example, dtype=like.dtype, device=like.device),), {}
    return tuple(move(value) for value in example), {}


def _count_samples(values: list[Any], batch_size: int | None) -> int:
    leading = next((value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim), 0)
    samples = leading if batch_size is None else batch_size
    if samples < 1:
        raise ConfigurationError("the example holds no sample: pass a batched tensor, or batch_size of at least 1")
    return samples


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode without gradients, compilation and fused attention; everything is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    # Fused encoder layers call no submodule in eval mode, so hooks on these would stay silent.
    fused = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m, _ in modes):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for module, training in modes:
                module.training = training
