"""Choosing the backend of each layer by measurement."""

from __future__ import annotations

import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from dst.backends.csr_support import is_supported
from dst.backends.prepare import prepare as prepare_csr
from dst.backends.swap import dense_module, exchange, sparse_module
from dst.errors import StateError
from dst.method import Method
from dst.nn import SparseConv2d, SparseLinear
from dst.topology.layers import Selector, SparseLayer
from dst.topology.sharding import from_first, rank

logger = logging.getLogger(__name__)

BATCH_SIZE = 128
"""Default batch size of measurements."""

_POSITIONS = 256  # per image under a 1×1 convolution; the image size is not known yet
_ROWS = 4096
_WEIGHTS = 1 << 24  # larger layers are scaled down
_REPEATS = 7
_SWEEP = 8 << 20
_DECIDED = "_dst_storage_is_decided"


@dataclass(frozen=True)
class Case:
    """A layer whose forward and backward pass is measured.

    Attributes:
        kind: The type of the dense module, ``nn.Linear`` or ``nn.Conv2d`` (1×1).
        inputs: Input features or channels.
        outputs: Output features or channels.
        active: Number of non-zeros.
        batch_size: Batch size.
        dtype: dtype of the weights.
    """

    kind: type[nn.Module]
    inputs: int
    outputs: int
    active: int
    batch_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Timing:
    """Seconds per forward and backward pass.

    Attributes:
        dense: Time of the dense layer.
        sparse: Time of the layer that stores only non-zeros.
    """

    dense: float
    sparse: float

    @property
    def ratio(self) -> float:
        """Speedup of the sparse layer. csr is chosen above 1."""
        return self.dense / max(self.sparse, 1e-12)


Measure: TypeAlias = Callable[[Case], Timing]


def case_of(module: nn.Linear | nn.Conv2d, active: int, batch_size: int | None) -> Case:
    """The case of a dense module with ``active`` active weights."""
    outputs, inputs = module.weight.shape[:2]
    kind = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
    return Case(kind, inputs, outputs, active, batch_size or BATCH_SIZE, module.weight.dtype)


def measure(case: Case) -> Timing:
    """Time a dense and a sparse layer alternately, with cold caches. Returns the medians of seven runs.

    Takes a few tenths of a second for a layer of a million weights. Layers with more than 16 million weights are scaled
    down at the same proportions and density. A 1×1 convolution is measured on images of 16×16. Does not change global
    random state.
    """
    weights = case.inputs * case.outputs
    scale = min(1.0, math.sqrt(_WEIGHTS / weights))
    inputs, outputs = max(1, int(case.inputs * scale)), max(1, int(case.outputs * scale))
    active = max(1, round(case.active * inputs * outputs / weights))
    generator = torch.Generator().manual_seed(0)
    dense: nn.Module
    sparse: nn.Module
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        if case.kind is nn.Conv2d:
            images = max(1, min(case.batch_size, _ROWS // _POSITIONS))
            shape: tuple[int, ...] = (images, inputs, 16, 16)
            dense = nn.Conv2d(inputs, outputs, 1, dtype=case.dtype)
            positions = SparseLinear.random(inputs, outputs, active, generator).pattern.flat()
            sparse = SparseConv2d(inputs, outputs, positions, dtype=case.dtype, generator=generator)
        else:
            shape = (case.batch_size, inputs)
            dense = nn.Linear(inputs, outputs, dtype=case.dtype)
            sparse = SparseLinear.random(inputs, outputs, active, generator, dtype=case.dtype)
        x = torch.randn(shape, generator=generator).to(case.dtype)
        gradient = torch.randn((shape[0], outputs, *shape[2:]), generator=generator).to(case.dtype)
        sweep = torch.zeros(_SWEEP)
    times: dict[nn.Module, list[float]] = {dense: [], sparse: []}
    for _ in range(_REPEATS + 1):
        for module, taken in times.items():
            sweep.add_(1)
            taken.append(_step(module, x, gradient))
    return Timing(statistics.median(times[dense][1:]), statistics.median(times[sparse][1:]))


def _step(module: nn.Module, x: Tensor, gradient: Tensor) -> float:
    with torch.enable_grad():
        module.zero_grad()
        x = x.requires_grad_()
        x.grad = None
        # With a single thread, its CPU time is not affected by other processes.
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        module(x).backward(gradient)
        return clock() - start


class Chooser:
    """Decides layer by layer by measurement, and keeps the reasons.

    Args:
        batch_size: Batch size, ``BATCH_SIZE`` by default.
        measure: The measurement.
        group: The process group. Rank 0 measures.
    """

    def __init__(
        self, batch_size: int | None = None, measure: Measure | None = None, group: ProcessGroup | None = None
    ) -> None:
        self._batch_size, self._measure, self._group = batch_size, measure, group
        self._known: dict[Case, Timing] = {}
        self.reasons: dict[str, str] = {}

    def __call__(self, layer: SparseLayer, module: nn.Linear | nn.Conv2d, active: int) -> bool:
        """Whether to store only the ``active`` weights of a dense module."""
        case = case_of(module, active, self._batch_size)
        if case not in self._known:
            mine = (self._measure or measure)(case) if rank(self._group) == 0 else None
            dense, sparse = from_first([0.0, 0.0] if mine is None else [mine.dense, mine.sparse], self._group)
            self._known[case] = Timing(dense, sparse)
        ratio = self._known[case].ratio
        self.reasons[layer.label] = f"{ratio:.2g} × dense speed, measured at batch {case.batch_size}"
        return ratio > 1


def prepare(
    model: nn.Module,
    method: Method,
    *,
    seed: int,
    include: Iterable[Selector] | None,
    exclude: Iterable[Selector] | None,
    batch_size: int | None = None,
    state: Mapping[str, Any] | None = None,
    group: ProcessGroup | None = None,
) -> nn.Module:
    """Swap the layers that are faster with csr, and log each decision; see ``dst.prepare``."""
    if is_decided(model):
        return model
    if reason := method.needs_inactive_weights():
        report(f"backend=auto: all layers masked ({method.name} needs inactive weights: {reason})", group)
        return model
    chooser = Chooser(batch_size, group=group)
    outcome: dict[str, tuple[str, str]] = {}

    def choose(layer: SparseLayer, module: nn.Linear | nn.Conv2d, active: int) -> bool:
        sparse = chooser(layer, module, active) if state is None else _saved(state, layer)
        why = chooser.reasons.get(layer.label, "as in the checkpoint")
        outcome[layer.label] = ("csr" if sparse else "masked", why)
        return sparse

    def keep(layer: SparseLayer, storage: str, reason: str) -> None:
        outcome[layer.label] = (storage, reason)

    model = prepare_csr(model, method, seed=seed, include=include, exclude=exclude, choose=choose, keep=keep)
    for label, (storage, reason) in outcome.items():
        report(f"backend=auto: {label} {storage} ({reason})", group)
    model.__dict__[_DECIDED] = True
    return model


def is_decided(model: nn.Module) -> bool:
    """Whether a model is prepared. Its masked layers then stay masked."""
    return _DECIDED in model.__dict__ or any(
        isinstance(m, SparseLinear) and m.pattern_seed is not None for m in model.modules()
    )


def _saved(state: Mapping[str, Any], layer: SparseLayer) -> bool:
    """Whether a sparsifier's state stores positions instead of a mask for a layer."""
    masks = state.get("masks")
    if not isinstance(masks, Mapping) or not isinstance(masks.get(layer.parameter), Tensor):
        raise StateError(f"the state has no mask of {layer.parameter}: it belongs to another model, or is damaged")
    return bool(masks[layer.parameter].dtype != torch.bool)


def restore_modules(seed: int, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Swap a model's modules for those that a state dict was saved from; a ``load_state_dict`` pre-hook.

    Measurements differ between runs, so a resumed run takes its decisions from the checkpoint.

    Args:
        seed: See ``dst.prepare``.
        module: The model, before its optimizer is built.
        state_dict: The state dict that is about to be loaded.
        prefix: Prefix of the model's names in the state dict.
    """
    exchanged: dict[nn.Module, nn.Module] = {}
    for name, child in module.named_modules():
        start = f"{prefix}{name}." if name else prefix
        saved_sparse = f"{start}column_pointers" in state_dict and f"{start}values" in state_dict
        if isinstance(child, SparseLinear) and not saved_sparse and f"{start}weight" in state_dict:
            exchanged[child] = dense_module(child)
            report(f"backend=auto: {name}.weight masked (as in the checkpoint)")
        elif saved_sparse and is_supported(child):
            # The positions are placeholders: loading the state dict sets them.
            count = state_dict[f"{start}values"].numel()
            exchanged[child] = sparse_module(name, child, torch.arange(count), seed)
            report(f"backend=auto: {name}.weight csr (as in the checkpoint)")
    exchange(module, exchanged)


def report(message: str, group: ProcessGroup | None = None) -> None:
    """Log a decision on rank 0, or print it to standard error if the log level hides it."""
    if rank(group) != 0:
        return
    if logger.isEnabledFor(logging.INFO):
        logger.info(message)
    else:
        print(message, file=sys.stderr)
