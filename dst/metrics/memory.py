"""Predicted memory by purpose, and the measured peak."""

from __future__ import annotations

import sys
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from dst.errors import ConfigurationError
from dst.metrics.passes import Example, forward_arguments, undisturbed
from dst.nn import SparseLinear
from dst.tables import aligned_table

STORAGES = ("masked", "latent", "csr")
"""Backends whose memory can be predicted."""

_NARROW = 1 << 16
"""Largest number of rows and columns for which csr storage keeps indices in two bytes."""

_UNION_BYTES = 1 << 23
"""Most bytes in which csr storage keeps one bit per weight that was ever active."""


@dataclass(frozen=True)
class Memory:
    """Memory in bytes, by purpose.

    Attributes:
        weights: Parameters, their copies in training and kernels, and buffers.
        topology: Masks, or indices of the stored non-zeros.
        gradients: Gradients of all trained parameters.
        optimizer_state: State of the optimizer, such as momentum.
        activations: Tensors that the forward pass keeps for the backward pass; in inference, the largest sum of a layer's
            inputs and outputs.
    """

    weights: int
    topology: int
    gradients: int
    optimizer_state: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all parts: an upper bound of the peak, without the memory of kernels and allocators themselves."""
        return self.weights + self.topology + self.gradients + self.optimizer_state + self.activations

    def __str__(self) -> str:
        parts = {name.replace("_", " "): value for name, value in vars(self).items()} | {"total": self.total}
        return aligned_table([(name, f"{value / 2**20:.2f} MiB") for name, value in parts.items()], right={1})


def predict_memory(
    model: nn.Module,
    example: Example,
    active: Mapping[str, int],
    *,
    backend: str | Mapping[str, str] = "masked",
    optimizer: Optimizer | None = None,
    dynamic: bool = True,
    activations: int | None = None,
) -> Memory:
    """Predict the memory of training or inference from the number of active weights.

    In training, a parameter of n weights of s bytes each, a of them active, takes

    ============  ==========================  ========================  ===============================================
    part          masked                      latent                    csr
    ============  ==========================  ========================  ===============================================
    weights       n·s                         2·n·s (latent ones too)   2·a·s (by columns, and a copy by rows)
    topology      n (mask) + n·s (its bits)   as masked                 a·(2·i + 4) + 4·(rows + 1) + 4·(columns + 1)
                  + n (union, if dynamic)                               + n/8, at most 8 MiB (union, if dynamic)
    gradients     n·s                         n·s                       a·s
    state         n per copy of the weights   n per copy                a per copy
    ============  ==========================  ========================  ===============================================

    where i is the size of an index: 2 bytes if neither side exceeds 65,536, otherwise 4. With 32-bit weights and one momentum
    a non-zero of csr storage takes 24 bytes. The bits are kept for parameters with inactive weights. Masked and latent
    storage need more than a dense network. The prediction leaves out parameters of a relaxation and temporary tensors of
    topology updates.

    Args:
        model: The dense model, or one of `dst.prepare`: its layers that already store only non-zeros count as they are. It
            is run once on its own device, in training mode if there is an optimizer, and not changed. On the ``meta``
            device nothing is computed.
        example: A batch, as in `dst.metrics.count_operations`.
        active: Parameter name -> number of active weights, for the sparse parameters.
        backend: "masked", "latent" or "csr", for all sparse parameters; or a mapping from parameter names, whose default
            is "masked".
        optimizer: The optimizer of the training. A step on a small parameter finds the size of its state. None predicts
            inference, without gradients, optimizer state, masks and latent weights.
        dynamic: Whether the topology is updated. The union of all masks is then kept.
        activations: Bytes of activations from `activation_bytes`, if known. The model is then not run.

    Returns:
        The prediction.

    Raises:
        ConfigurationError: If a backend is unknown, a parameter does not exist, or a number of active weights is out of
            range.

    Example:
        >>> import torch
        >>> from dst.metrics import predict_memory
        >>> model = torch.nn.Linear(100, 10, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        >>> predict_memory(model, torch.zeros(8, 100), {"weight": 50}, backend="csr", optimizer=optimizer)
        Memory(weights=400, topology=973, gradients=200, optimizer_state=200, activations=3200)
    """
    backends = dict.fromkeys(active, backend) if isinstance(backend, str) else backend
    for kind in [backend] if isinstance(backend, str) else backends.values():
        if kind not in STORAGES:
            raise ConfigurationError(f"backend={kind!r} is unknown; choose from {', '.join(STORAGES)}")
    named = dict(model.named_parameters())
    for name, count in active.items():
        if name not in named:
            raise ConfigurationError(f"the model has no parameter {name}")
        if not 0 <= count <= named[name].numel():
            raise ConfigurationError(f"{name} has {named[name].numel()} weights; {count} of them cannot be active")
    training = optimizer is not None
    state = _state_bytes(optimizer) if optimizer is not None else {}
    weights = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    topology = gradients = optimizer_state = 0
    for name, parameter in named.items():
        size, count = parameter.element_size(), parameter.numel()
        kind = backends.get(name, "masked") if name in active else "dense"
        stored = active[name] if kind == "csr" else count
        copies = 2 if kind == "csr" or (kind == "latent" and training) else 1
        weights += copies * stored * size
        if kind == "csr":
            topology += _index_bytes(parameter.shape, stored)
            topology += _union_bytes(count) if training and dynamic else 0
        elif kind != "dense" and training:
            topology += count * (1 + dynamic) + (count * size if active[name] < count else 0)
        if training and parameter.requires_grad:
            gradients += stored * size
            per_weight, fixed = state.get(id(parameter), (0, 0))
            optimizer_state += stored * per_weight + fixed
    for module in model.modules():
        if isinstance(module, SparseLinear):
            weights += module.values.numel() * module.values.element_size()
            topology += module.pattern.nbytes + (_union_bytes(prod(module.shape)) if training and dynamic else 0)
    if activations is None:
        activations = activation_bytes(model, example, training=training)
    return Memory(weights, topology, gradients, optimizer_state, activations)


def _union_bytes(weights: int) -> int:
    """Bytes of the union of all positions in csr storage."""
    return min(-(-weights // 8), _UNION_BYTES)


def _index_bytes(shape: torch.Size, stored: int) -> int:
    """Bytes of the index tensors of csr storage: both orders, their pointers, and the permutation between them."""
    rows, columns = shape[0], shape[1:].numel()
    narrow = max(rows, columns) <= _NARROW
    return stored * (2 * (2 if narrow else 4) + 4) + 4 * (rows + 1 + columns + 1)


def activation_bytes(model: nn.Module, example: Example, *, training: bool = True) -> int:
    """Measure the activations of a forward pass of a batch, in bytes.

    Args:
        model: The model. It is run once on its own device, ``meta`` included, and not changed.
        example: A batch, as in `dst.metrics.count_operations`.
        training: True for the tensors that autograd keeps for the backward pass, without parameters and buffers, and
            tensors that share memory once; False for the largest sum of a layer's inputs and outputs.

    Returns:
        The bytes.
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    args, kwargs = forward_arguments(example, first)
    with undisturbed(model, first.device), ExitStack() as stack:
        if not training:
            return _largest_layer(model, args, kwargs, stack)
        model.train()
        buffers = {
            name: buffer.clone() for name, buffer in model.named_buffers()
        }  # a training pass changes batch statistics
        own = {_memory(t) for t in (*model.parameters(), *buffers.values())}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if _memory(tensor) not in own:
                kept[_memory(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        output = functional_call(
            model, buffers, args, kwargs
        )  # kept until here: freed memory could be reused and counted once only
        del output
    return sum(kept.values())


def _largest_layer(model: nn.Module, args: Any, kwargs: Any, stack: ExitStack) -> int:
    largest = 0

    def measure(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal largest
        tensors = [t for t in tree_leaves((args, kwargs, output)) if isinstance(t, Tensor)]
        memory = {_memory(t): t.untyped_storage().nbytes() for t in tensors}
        largest = max(largest, sum(memory.values()))

    for module in model.modules():
        if not any(module.children()):
            stack.callback(module.register_forward_hook(measure, with_kwargs=True).remove)
    model(*args, **kwargs)
    return largest


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _state_bytes(optimizer: Optimizer) -> dict[int, tuple[int, int]]:
    """Parameter id -> bytes of optimizer state per weight, and bytes in addition, found by a step on a small parameter.

    State of the shape of the parameter counts per weight. Other state counts with its size for the small parameter.
    """
    result = {}
    for group in optimizer.param_groups:
        known: dict[tuple[torch.dtype, str], tuple[int, int]] = {}
        for parameter in group["params"]:
            device = "cpu" if parameter.device.type == "meta" else str(parameter.device)
            key = parameter.dtype, device
            if key not in known:
                known[key] = _probe(optimizer, group, *key)
            result[id(parameter)] = known[key]
    return result


def _probe(optimizer: Optimizer, group: Mapping[str, Any], dtype: torch.dtype, device: str) -> tuple[int, int]:
    small = nn.Parameter(torch.ones(3, 5, dtype=dtype, device=device))
    small.grad = torch.ones_like(small)
    twin = object.__new__(type(optimizer))  # copy.copy omits attributes that a subclass adds
    vars(twin).update(vars(optimizer))
    # Hooks and a scheduler's wrapper of the original must not see this step.
    vars(twin).pop("step", None)
    hooks: Any = OrderedDict()
    vars(twin).update(
        state=defaultdict(dict),
        param_groups=[{**group, "params": [small]}],
        _optimizer_step_pre_hooks=hooks,
        _optimizer_step_post_hooks=hooks.copy(),
    )
    twin.step()
    tensors = [value for value in twin.state[small].values() if isinstance(value, Tensor)]
    per_weight = sum(t.element_size() for t in tensors if t.shape == small.shape)
    return per_weight, sum(t.numel() * t.element_size() for t in tensors if t.shape != small.shape)


class PeakMemory:
    """Measures the peak of memory in a ``with`` block.

    On a CUDA device it is the memory allocated by PyTorch, elsewhere the resident memory of the whole process, Python and
    libraries included. Compare `increase` with a prediction; memory freed before the block is reused and not counted.

    Args:
        device: Device of the model.

    Attributes:
        before: Bytes in use at the start of the block.
        peak: Largest number of bytes in use during the block.
        source: What was measured, in words.

    Example:
        >>> import torch
        >>> from dst.metrics import PeakMemory
        >>> with PeakMemory() as memory:
        ...     _ = torch.ones(2**24).sum()
        >>> memory.increase >= 0
        True
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.before = self.peak = 0
        self.source = ""

    @property
    def increase(self) -> int:
        """Peak minus the bytes in use before, >= 0."""
        return max(0, self.peak - self.before)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            self.source = "torch.cuda.max_memory_allocated"
        else:
            self.before = resident_bytes()
            since = "" if _reset_peak() else ", peak since the process began"
            self.source = f"resident memory{since}" if self.before else "nothing: the system does not tell"
        return self

    def __exit__(self, *args: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self.peak = max(self.before, _peak_resident_bytes())


_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Resident memory of this process; its peak so far on systems that do not report the present value."""
    return _status("VmRSS") or _largest_resident()


def _peak_resident_bytes() -> int:
    return _status("VmHWM") or _largest_resident()


def _status(field: str) -> int:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    found = next((line.split() for line in lines if line.startswith(f"{field}:")), None)
    return int(found[1]) * 1024 if found else 0


def _largest_resident() -> int:
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _reset_peak() -> bool:
    """Reset the peak of this process in the kernel. Returns whether it worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return bool(_status("VmHWM"))
