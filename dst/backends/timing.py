"""Times one layer, masked and as non-zeros, on the shapes that it sees in its model."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dst.backends.csr_support import is_supported
from dst.backends.masked import BitMasks
from dst.backends.swap import sparse_module, sparse_recurrent
from dst.errors import ConfigurationError
from dst.nn import SparseLinear
from dst.topology.evaluation import evaluation_mode
from dst.topology.layers import is_conv1d
from dst.topology.selection import random_indices

BATCH_SIZE = 128
"""Default batch size of measurements."""

_IMAGE = 16, 16  # where no example tells the size
_ROWS = 4096  # of a linear layer
_POSITIONS = 16384  # of all images of a batch, under a convolution
_STEPS = 32  # of a recurrent module, at most and where no example tells
_WEIGHTS = 1 << 24  # larger linear layers are scaled down
_REPEATS = 7
_SWEEP = 8 << 20

Geometry: TypeAlias = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Case:
    """A layer that is measured.

    Attributes:
        kind: The type of the dense module: ``nn.Linear``, ``nn.Conv2d``, ``nn.LSTM`` or ``nn.GRU``.
        inputs: Input features or channels.
        outputs: Output features or channels; units of a recurrent module.
        active: Number of non-zeros; of a recurrent module, of both weights of a layer.
        batch_size: Batch size, or rows of a linear layer's input.
        dtype: dtype of the weights.
        image: Height and width of a convolution's input.
        geometry: A convolution's kernel size, stride, padding and dilation.
        steps: Length of a recurrent module's sequences.
    """

    kind: type[nn.Module]
    inputs: int
    outputs: int
    active: int
    batch_size: int
    dtype: torch.dtype
    image: tuple[int, int] | None = None
    geometry: Geometry | None = None
    steps: int | None = None

    def __str__(self) -> str:
        if self.steps is not None:
            return f"{self.batch_size} sequences of {self.steps} steps"
        if self.image is None:
            return f"{self.batch_size} rows"
        return f"{self.batch_size} images of {'×'.join(map(str, self.image))}"


@dataclass(frozen=True)
class Timing:
    """Seconds that a layer takes of a training step.

    Attributes:
        masked: Time of the dense layer, with masking.
        sparse: Time of the layer that stores only non-zeros.
    """

    masked: float
    sparse: float

    @property
    def ratio(self) -> float:
        """Speedup of the sparse layer."""
        return self.masked / max(self.sparse, 1e-12)


Measure: TypeAlias = Callable[[Case], Timing]


def input_shapes(model: nn.Module, example: Any) -> dict[nn.Module, tuple[int, ...]]:
    """Run a model once and record the input shape of every module that csr supports.

    The model runs in evaluation mode without gradients and leaves no trace in torch's random state.

    Args:
        model: The model.
        example: A batch: a tensor, or a tuple of positional or a mapping of keyword arguments.

    Returns:
        Module to the shape of its input; of the largest, where it is called several times.

    Raises:
        ConfigurationError: The model cannot be called with the example.
    """
    found: dict[nn.Module, tuple[int, ...]] = {}

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            shape = tuple(args[0].shape)
            # Attention does not call its output projection.
            for called in (module, module.out_proj) if isinstance(module, nn.MultiheadAttention) else (module,):
                found[called] = max(found.get(called, shape), shape, key=math.prod)

    hooks: list[RemovableHandle] = [
        module.register_forward_pre_hook(record)
        for module in model.modules()
        if is_supported(module) or isinstance(module, (nn.MultiheadAttention, nn.RNNBase))
    ]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluation_mode(model):
            if isinstance(example, Mapping):
                model(**example)
            else:
                model(*(example if isinstance(example, (tuple, list)) else (example,)))
    except Exception as error:
        raise ConfigurationError(
            f"{type(model).__name__} cannot be called with the example ({type(error).__name__}: {error}): pass one batch of "
            "inputs, a tuple of arguments, or a dict of keyword arguments"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return found


def case_of(
    module: nn.Module,
    active: int,
    batch_size: int | None,
    shape: tuple[int, ...] | None = None,
    weight_name: str = "weight",
) -> Case:
    """The case of a dense module with ``active`` active weights.

    Args:
        module: The module; of attention, the projection to q, k and v.
        active: Number of non-zeros.
        batch_size: Batch size, if there is no shape; ``BATCH_SIZE`` by default.
        shape: Shape of the module's input.
        weight_name: Name of the weight of a recurrent module.
    """
    if isinstance(module, nn.RNNBase):
        return _recurrent_case(module, module.get_parameter(weight_name), active, batch_size, shape)
    packed = isinstance(module, nn.MultiheadAttention)
    weight = module.get_parameter("in_proj_weight" if packed else "weight")
    outputs, inputs = weight.shape[:2]
    if not isinstance(module, nn.Conv2d):
        if is_conv1d(module):
            outputs, inputs = inputs, outputs
        rows = math.prod(shape[:-1]) if shape else batch_size or BATCH_SIZE
        return Case(nn.Linear, inputs, outputs, active, rows, weight.dtype)
    images = (shape[0] if len(shape) == 4 else 1) if shape else batch_size or BATCH_SIZE
    image = (shape[-2], shape[-1]) if shape else _IMAGE
    sparse = sparse_module("", module, torch.empty(0, dtype=torch.int64), 0)
    geometry = tuple(getattr(sparse, name) for name in ("kernel_size", "stride", "padding", "dilation"))
    return Case(nn.Conv2d, inputs, outputs, active, images, weight.dtype, image, geometry)


def _recurrent_case(
    module: nn.RNNBase, weight: Tensor, active: int, batch_size: int | None, shape: tuple[int, ...] | None
) -> Case:
    """A layer of a recurrent module, both of whose weights have the density of ``weight``."""
    inputs, units, steps, batch = module.input_size, module.hidden_size, _STEPS, batch_size or BATCH_SIZE
    if shape is not None:
        batch, steps = (1, shape[0]) if len(shape) == 2 else shape[:2] if module.batch_first else (shape[1], shape[0])
    total = weight.shape[0] * (inputs + units)
    count = round(active / weight.numel() * total)
    return Case(type(module), inputs, units, count, batch, weight.dtype, steps=min(steps, _STEPS))


def _feedforward(case: Case, generator: torch.Generator) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A dense and a sparse layer, an input, and the gradient of the output."""
    weights = case.inputs * case.outputs
    scale = min(1.0, math.sqrt(_WEIGHTS / weights)) if case.geometry is None else 1.0
    inputs, outputs = max(1, int(case.inputs * scale)), max(1, int(case.outputs * scale))
    dense: nn.Linear | nn.Conv2d
    if case.geometry is not None and case.image is not None:
        images = max(1, min(case.batch_size, _POSITIONS // math.prod(case.image)))
        shape: tuple[int, ...] = (images, inputs, *case.image)
        dense = nn.Conv2d(inputs, outputs, *case.geometry, dtype=case.dtype)
    else:
        shape = (min(case.batch_size, _ROWS), inputs)
        dense = nn.Linear(inputs, outputs, dtype=case.dtype)
    size = dense.weight.numel()
    active = min(size, max(1, round(case.active * inputs * outputs / weights)))
    sparse = sparse_module("measured", dense, random_indices(size, active, generator), 0)
    x = torch.randn(shape, generator=generator).to(case.dtype)
    with torch.no_grad():
        return dense, sparse, x, torch.randn(dense(x).shape, generator=generator).to(case.dtype)


def _recurrent(case: Case, generator: torch.Generator) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A dense and a sparse recurrent module, an input, and the gradient of the output."""
    assert case.steps is not None
    dense = case.kind(case.inputs, case.outputs, dtype=case.dtype)
    weights = {n: p for n, p in dense.named_parameters() if n.startswith("weight")}
    density = case.active / sum(p.numel() for p in weights.values())
    stored = {}
    for name, weight in weights.items():
        size = weight.numel()
        positions = random_indices(size, min(size, round(density * size)), generator)
        stored[name] = sparse_module(name, dense, positions, 0)
    sparse = sparse_recurrent(dense, stored, 0)
    x, g = (torch.randn(case.steps, case.batch_size, n, generator=generator) for n in (case.inputs, case.outputs))
    return dense, sparse, x.to(case.dtype), g.to(case.dtype)


def measure(case: Case) -> Timing:
    """Time a masked and a sparse layer alternately, with cold caches. Returns the medians of seven runs.

    A run is the layer's share of a training step: forward and backward pass, masking, and SGD with momentum on its weights.
    It takes a few tenths of a second for a layer of a million weights. Linear layers with more than 16 million weights are
    scaled down at the same proportions and density. At most 4096 rows, images of 16384 positions in all, or 32 steps of a
    sequence are measured.
    Does not change global random state.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        build = _feedforward if case.steps is None else _recurrent
        dense, sparse, x, gradient = build(case, generator)
        sweep = torch.zeros(_SWEEP)
    bits, stored = BitMasks(), [m for m in sparse.modules() if isinstance(m, SparseLinear)]
    weights = [p for n, p in dense.named_parameters() if n.startswith("weight")]
    for weight, module in zip(weights, stored, strict=True):
        bits.set(weight, module.mask())
    steps = _Step(dense, weights, bits), _Step(sparse, [module.values for module in stored], bits)
    times: list[list[float]] = [[], []]
    for _ in range(_REPEATS + 1):
        for step, taken in zip(steps, times, strict=True):
            sweep.add_(1)
            taken.append(step(x, gradient))
    masked, csr = (statistics.median(taken[1:]) for taken in times)
    return Timing(masked, csr)


class _Step:
    """A training step of one layer.

    Args:
        module: The layer.
        weights: The parameters that the optimizer moves.
        bits: The masks; of a sparse layer there are none.
    """

    def __init__(self, module: nn.Module, weights: Sequence[nn.Parameter], bits: BitMasks) -> None:
        self._module, self._weights, self._bits = module, tuple(weights), bits
        self._momenta = [torch.zeros_like(weight) for weight in weights]

    def __call__(self, x: Tensor, gradient: Tensor) -> float:
        """Take the step and return its time in seconds."""
        with torch.enable_grad():
            self._module.zero_grad()
            x = x.requires_grad_()
            x.grad = None
            # With a single thread, its CPU time is not affected by other processes.
            clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
            start = clock()
            y = self._module(x)
            (y[0] if isinstance(y, tuple) else y).backward(gradient)
        self._bits.mask_gradients(self._weights)
        with torch.no_grad():
            for weight, momentum in zip(self._weights, self._momenta, strict=True):
                if weight.grad is not None:
                    weight.add_(momentum.mul_(0.9).add_(weight.grad), alpha=-1e-6)
        self._bits.mask_weights(self._weights)
        return clock() - start
