"""Times one layer, masked and as non-zeros, on the shapes that it sees in its model."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dst.backends.csr_support import is_supported
from dst.backends.masked import BitMasks
from dst.backends.swap import sparse_module
from dst.errors import ConfigurationError
from dst.topology.evaluation import evaluation_mode
from dst.topology.layers import is_conv1d
from dst.topology.selection import random_indices

BATCH_SIZE = 128
"""Default batch size of measurements."""

_IMAGE = 16, 16  # where no example tells the size
_ROWS = 4096  # of a linear layer
_POSITIONS = 16384  # of all images of a batch, under a convolution
_WEIGHTS = 1 << 24  # larger linear layers are scaled down
_REPEATS = 7
_SWEEP = 8 << 20

Geometry: TypeAlias = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Case:
    """A layer that is measured.

    Attributes:
        kind: The type of the dense module, ``nn.Linear`` or ``nn.Conv2d``.
        inputs: Input features or channels.
        outputs: Output features or channels.
        active: Number of non-zeros.
        batch_size: Batch size, or rows of a linear layer's input.
        dtype: dtype of the weights.
        image: Height and width of a convolution's input.
        geometry: A convolution's kernel size, stride, padding and dilation.
    """

    kind: type[nn.Module]
    inputs: int
    outputs: int
    active: int
    batch_size: int
    dtype: torch.dtype
    image: tuple[int, int] | None = None
    geometry: Geometry | None = None

    def __str__(self) -> str:
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
        if is_supported(module) or isinstance(module, nn.MultiheadAttention)
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


def case_of(module: nn.Module, active: int, batch_size: int | None, shape: tuple[int, ...] | None = None) -> Case:
    """The case of a dense module with ``active`` active weights.

    Args:
        module: The module; of attention, the projection to q, k and v.
        active: Number of non-zeros.
        batch_size: Batch size, if there is no shape; ``BATCH_SIZE`` by default.
        shape: Shape of the module's input.
    """
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


def measure(case: Case) -> Timing:
    """Time a masked and a sparse layer alternately, with cold caches. Returns the medians of seven runs.

    A run is the layer's share of a training step: forward and backward pass, masking, and SGD with momentum on its weights.
    It takes a few tenths of a second for a layer of a million weights. Linear layers with more than 16 million weights are
    scaled down at the same proportions and density. At most 4096 rows, or images of 16384 positions in all, are measured.
    Does not change global random state.
    """
    weights = case.inputs * case.outputs
    scale = min(1.0, math.sqrt(_WEIGHTS / weights)) if case.geometry is None else 1.0
    inputs, outputs = max(1, int(case.inputs * scale)), max(1, int(case.outputs * scale))
    generator = torch.Generator().manual_seed(0)
    dense: nn.Linear | nn.Conv2d
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        if case.geometry is not None and case.image is not None:
            images = max(1, min(case.batch_size, _POSITIONS // math.prod(case.image)))
            shape: tuple[int, ...] = (images, inputs, *case.image)
            dense = nn.Conv2d(inputs, outputs, *case.geometry, dtype=case.dtype)
        else:
            shape = (min(case.batch_size, _ROWS), inputs)
            dense = nn.Linear(inputs, outputs, dtype=case.dtype)
        size = dense.weight.numel()
        active = min(size, max(1, round(case.active * inputs * outputs / weights)))
        indices = random_indices(size, active, generator)
        sparse = sparse_module("measured", dense, indices, 0)
        x = torch.randn(shape, generator=generator).to(case.dtype)
        with torch.no_grad():
            gradient = torch.randn(dense(x).shape, generator=generator).to(case.dtype)
        sweep = torch.zeros(_SWEEP)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[indices] = True
    bits = BitMasks()
    weight = dense.get_parameter("weight")
    bits.set(weight, mask.view_as(weight))
    steps = _Step(dense, weight, bits), _Step(sparse, sparse.values, bits)
    times: list[list[float]] = [[], []]
    for _ in range(_REPEATS + 1):
        for step, taken in zip(steps, times, strict=True):
            sweep.add_(1)
            taken.append(step(x, gradient))
    masked, stored = (statistics.median(taken[1:]) for taken in times)
    return Timing(masked, stored)


class _Step:
    """A training step of one layer.

    Args:
        module: The layer.
        weight: The parameter that the optimizer moves.
        bits: The masks; of a sparse layer there are none.
    """

    def __init__(self, module: nn.Module, weight: nn.Parameter, bits: BitMasks) -> None:
        self._module, self._weight, self._bits = module, weight, bits
        self._momentum = torch.zeros_like(weight)

    def __call__(self, x: Tensor, gradient: Tensor) -> float:
        """Take the step and return its time in seconds."""
        weight = self._weight
        with torch.enable_grad():
            self._module.zero_grad()
            x = x.requires_grad_()
            x.grad = None
            # With a single thread, its CPU time is not affected by other processes.
            clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
            start = clock()
            self._module(x).backward(gradient)
        self._bits.mask_gradients((weight,))
        if weight.grad is not None:
            with torch.no_grad():
                weight.add_(self._momentum.mul_(0.9).add_(weight.grad), alpha=-1e-6)
        self._bits.mask_weights((weight,))
        return clock() - start
