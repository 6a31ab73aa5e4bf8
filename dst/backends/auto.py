"""Choosing by measurement which layers store non-zeros alone."""

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

from dst.backends.prepare import prepare as prepare_csr
from dst.backends.servable import is_servable
from dst.backends.swap import dense_module, exchange, sparse_module
from dst.errors import StateError
from dst.method import Method
from dst.nn import SparseConv2d, SparseLinear
from dst.topology.layers import Selector, SparseLayer
from dst.topology.sharding import from_first, rank

logger = logging.getLogger(__name__)

BATCH_SIZE = 128
"""Examples of a batch where nobody knows better."""

_POSITIONS = 256  # of an image under a 1×1 convolution: how large images are is not known before there are any
_ROWS = 4096
_WEIGHTS = 1 << 24  # of a layer that is measured as it is
_REPEATS = 7
_SWEEP = 8 << 20
_DECIDED = "_dst_storage_is_decided"


@dataclass(frozen=True)
class Case:
    """What is measured: one layer's forward and backward pass.

    Attributes:
        kind: The type of the dense module, ``nn.Linear`` or ``nn.Conv2d`` (1×1).
        inputs: Input features or channels.
        outputs: Output features or channels.
        active: Non-zeros.
        batch_size: Examples of a batch.
        dtype: Of the weights.
    """

    kind: type[nn.Module]
    inputs: int
    outputs: int
    active: int
    batch_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Timing:
    """Seconds that a forward and backward pass takes.

    Attributes:
        dense: With all weights.
        sparse: With non-zeros alone.
    """

    dense: float
    sparse: float

    @property
    def ratio(self) -> float:
        """How much faster the sparse layer is; csr is chosen above 1."""
        return self.dense / max(self.sparse, 1e-12)


Measure: TypeAlias = Callable[[Case], Timing]


def case_of(module: nn.Linear | nn.Conv2d, active: int, batch_size: int | None) -> Case:
    """Describe a dense module that is to have ``active`` weights."""
    outputs, inputs = module.weight.shape[:2]
    kind = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
    return Case(kind, inputs, outputs, active, batch_size or BATCH_SIZE, module.weight.dtype)


def measure(case: Case) -> Timing:
    """Time a dense and a sparse layer in turns, with other memory read in between: medians of seven.

    Takes some tenths of a second for a layer of a million weights. A layer of more than 16 million is measured by a smaller
    one of its proportions and density, a 1×1 convolution on images of 16×16. Touches no global random state.
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
        # Other processes disturb the time of one thread less.
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        module(x).backward(gradient)
        return clock() - start


class Chooser:
    """Decides layer by layer, and keeps what it decided and why.

    Args:
        batch_size: Examples of a batch, ``BATCH_SIZE`` by default.
        measure: Takes the times.
        group: The processes that train together: the first one's times count.
    """

    def __init__(
        self, batch_size: int | None = None, measure: Measure | None = None, group: ProcessGroup | None = None
    ) -> None:
        self._batch_size, self._measure, self._group = batch_size, measure, group
        self._known: dict[Case, Timing] = {}
        self.reasons: dict[str, str] = {}

    def __call__(self, layer: SparseLayer, module: nn.Linear | nn.Conv2d, active: int) -> bool:
        """Whether to store only the ``active`` weights of a layer's dense module."""
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
    """Swap the layers that are faster sparse, and say of each what became of it; see ``dst.prepare``."""
    if is_decided(model):
        return model
    if reason := method.needs_inactive_weights():
        say(f"backend=auto: all layers masked ({method.name} trains more than non-zeros: {reason})", group)
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
        say(f"backend=auto: {label} {storage} ({reason})", group)
    model.__dict__[_DECIDED] = True
    return model


def is_decided(model: nn.Module) -> bool:
    """Whether a model was prepared before; layers that stayed masked then stay so."""
    return _DECIDED in model.__dict__ or any(
        isinstance(m, SparseLinear) and m.pattern_seed is not None for m in model.modules()
    )


def _saved(state: Mapping[str, Any], layer: SparseLayer) -> bool:
    """Whether a sparsifier's state holds a layer as non-zeros: positions instead of a mask."""
    masks = state.get("masks")
    if not isinstance(masks, Mapping) or not isinstance(masks.get(layer.parameter), Tensor):
        raise StateError(
            f"the state to go on from has no mask of {layer.parameter}: it is of another model, or damaged"
        )
    return bool(masks[layer.parameter].dtype != torch.bool)


def follow(seed: int, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Exchange a model's modules for those that a state dict was saved from; a ``load_state_dict`` pre-hook.

    Times differ from run to run: one that goes on from a checkpoint keeps what was chosen there.

    Args:
        seed: As for ``dst.prepare``.
        module: The model, before its optimizer is built.
        state_dict: What is about to be loaded.
        prefix: Of the model's names in it.
    """
    exchanged: dict[nn.Module, nn.Module] = {}
    for name, child in module.named_modules():
        start = f"{prefix}{name}." if name else prefix
        saved_sparse = f"{start}column_pointers" in state_dict and f"{start}values" in state_dict
        if isinstance(child, SparseLinear) and not saved_sparse and f"{start}weight" in state_dict:
            exchanged[child] = dense_module(child)
            say(f"backend=auto: {name}.weight masked (as in the checkpoint)")
        elif saved_sparse and is_servable(child):
            # Positions come with the state dict; any others serve to build the layer.
            count = state_dict[f"{start}values"].numel()
            exchanged[child] = sparse_module(name, child, torch.arange(count), seed)
            say(f"backend=auto: {name}.weight csr (as in the checkpoint)")
    exchange(module, exchanged)


def say(message: str, group: ProcessGroup | None = None) -> None:
    """Tell what was chosen: by the log where anybody reads it, else on standard error; once for all processes."""
    if rank(group) != 0:
        return
    if logger.isEnabledFor(logging.INFO):
        logger.info(message)
    else:
        print(message, file=sys.stderr)
