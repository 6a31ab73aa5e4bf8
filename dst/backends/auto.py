"""Choosing the backend of each layer by measurement."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dst.backends import timing
from dst.backends.csr_support import is_supported
from dst.backends.decision import Choose, Decision
from dst.backends.prepare import prepare as prepare_csr
from dst.backends.swap import dense_module, exchange, sparse_attention, sparse_module, sparse_recurrent
from dst.backends.timing import Case, Measure, Timing, case_of, input_shapes
from dst.errors import StateError
from dst.method import Method
from dst.nn import RecurrentWeight, SparseLinear, SparseMultiheadAttention, SparseRecurrent
from dst.topology.layers import Selector, SparseLayer
from dst.topology.sharding import from_first, rank

logger = logging.getLogger(__name__)

MARGIN = 1.1
"""csr is chosen above this speedup of the layer alone. Within the model, other work shares caches and memory with it."""

SAVING = 1e-4
"""Seconds of a step that csr must save in a layer. In small layers, what the caches hold in the model decides."""

_CHOSEN_BY_LAYER = "_dst_storage_is_decided"
"""Attribute of a model whose layers were given backends one by one. Pickled models have it under this name."""


class Chooser:
    """Decides by measurement. Layers of equal shape and density are measured once.

    Args:
        batch_size: Batch size, ``BATCH_SIZE`` by default.
        measure: The measurement.
        group: The process group. Rank 0 measures.
        shapes: Dense module to the shape of its input, where it is known.
    """

    def __init__(
        self,
        batch_size: int | None = None,
        measure: Measure | None = None,
        group: ProcessGroup | None = None,
        shapes: Mapping[nn.Module, tuple[int, ...]] | None = None,
    ) -> None:
        self._batch_size, self._measure, self._group, self._shapes = batch_size, measure, group, shapes or {}
        self._known: dict[Case, Timing] = {}

    def __call__(self, layers: Sequence[SparseLayer], module: nn.Module, active: int) -> Decision:
        """Decide whether to store only the ``active`` weights of a dense module."""
        name = layers[0].parameter.rpartition(".")[2]
        case = case_of(module, active, self._batch_size, self._shapes.get(module), name)
        if case not in self._known:
            mine = (self._measure or timing.measure)(case) if rank(self._group) == 0 else None
            masked, sparse = from_first([0.0, 0.0] if mine is None else [mine.masked, mine.sparse], self._group)
            self._known[case] = Timing(masked, sparse)
        found, reason = self._known[case], ""
        if found.ratio > MARGIN and found.masked - found.sparse <= SAVING:
            reason = f", saving less than {1e3 * SAVING:g} ms"
        chosen = found.ratio > MARGIN and not reason
        measured = f"{found.ratio:.2g} × masked speed, measured on {case}"
        return Decision("csr" if chosen else "masked", measured + reason)


def prepare(
    model: nn.Module,
    method: Method,
    *,
    seed: int,
    include: Iterable[Selector] | None,
    exclude: Iterable[Selector] | None,
    batch_size: int | None = None,
    example: Any = None,
    state: Mapping[str, Any] | None = None,
    group: ProcessGroup | None = None,
) -> nn.Module:
    """Swap the layers that are faster with csr, and log each decision; see ``dst.prepare``."""
    if is_prepared(model):
        return model
    if reason := method.needs_inactive_weights():
        report(f"backend=auto: all layers masked ({method.name} needs inactive weights: {reason})", group)
        return model
    shapes = None if example is None or state is not None else input_shapes(model, example)
    choose: Choose = Chooser(batch_size, group=group, shapes=shapes) if state is None else _as_saved(state)

    def report_all(decisions: Mapping[str, Decision]) -> None:
        for label, (storage, reason) in decisions.items():
            report(f"backend=auto: {label} {storage} ({reason})", group)

    model = prepare_csr(model, method, seed=seed, include=include, exclude=exclude, choose=choose, report=report_all)
    model.__dict__[_CHOSEN_BY_LAYER] = True
    return model


def is_prepared(model: nn.Module) -> bool:
    """Whether ``dst.prepare`` or a checkpoint has chosen backends. Layers that are masked then stay masked."""
    return is_chosen_by_layer(model) or any(
        isinstance(m, SparseLinear) and m.pattern_seed is not None for m in model.modules()
    )


def is_chosen_by_layer(model: nn.Module) -> bool:
    """Whether the backend of each layer was chosen on its own: by measurement, or as in a checkpoint.

    With ``backend="csr"`` a layer is masked only if csr does not support it. Here any layer may be masked.
    """
    return _CHOSEN_BY_LAYER in model.__dict__


def _as_saved(state: Mapping[str, Any]) -> Choose:
    """Decide as a sparsifier's state was trained."""

    def choose(layers: Sequence[SparseLayer], module: nn.Module, active: int) -> Decision:
        saved = all(_saved(state, layer) for layer in layers)
        return Decision("csr" if saved else "masked", "as in the checkpoint")

    return choose


def _saved(state: Mapping[str, Any], layer: SparseLayer) -> bool:
    """Whether a sparsifier's state stores positions instead of a mask for a layer."""
    masks = state.get("masks")
    if not isinstance(masks, Mapping) or not isinstance(masks.get(layer.parameter), Tensor):
        raise StateError(f"the state has no mask of {layer.parameter}: it belongs to another model, or is damaged")
    return bool(masks[layer.parameter].dtype != torch.bool)


def restore_modules(seed: int, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Swap a model's modules for those that a state dict was saved from; a ``load_state_dict`` pre-hook.

    Measurements differ between runs, and versions in what csr supports, so a resumed run takes its decisions from the
    checkpoint. One that has no sparse layer at all was trained masked: its weights are loaded into the layers as they are.

    Args:
        seed: See ``dst.prepare``.
        module: The model, before its optimizer is built.
        state_dict: The state dict that is about to be loaded.
        prefix: Prefix of the model's names in the state dict.
    """
    if not is_chosen_by_layer(module) and not any(key.endswith("column_pointers") for key in state_dict):
        return
    exchanged: dict[nn.Module, nn.Module] = {}
    attentions: dict[nn.MultiheadAttention, SparseLinear] = {}
    for name, child in module.named_modules():
        start = f"{prefix}{name}." if name else prefix
        saved_sparse = f"{start}column_pointers" in state_dict and f"{start}values" in state_dict
        if isinstance(child, SparseMultiheadAttention) and f"{start}in_proj_weight" in state_dict:
            exchanged[child] = dense_module(child)
            report(f"{name}.in_proj_weight masked (as in the checkpoint)")
        elif type(child) is nn.MultiheadAttention and f"{start}in_proj.values" in state_dict:
            count = state_dict[f"{start}in_proj.values"].numel()
            attentions[child] = sparse_module(name, child, torch.arange(count), seed)
            report(f"{name}.in_proj_weight csr (as in the checkpoint)")
        elif type(child) in (nn.LSTM, nn.GRU) or isinstance(child, SparseRecurrent):
            if (restored := _restored_recurrent(name, child, state_dict, start, seed)) is not None:
                exchanged[child] = restored
        elif isinstance(child, SparseLinear) and not saved_sparse and f"{start}weight" in state_dict:
            exchanged[child] = dense_module(child)
            report(f"{name}.weight masked (as in the checkpoint)")
        elif saved_sparse and (is_supported(child) or isinstance(child, NonDynamicallyQuantizableLinear)):
            # The positions are placeholders: loading the state dict sets them.
            count = state_dict[f"{start}values"].numel()
            exchanged[child] = sparse_module(name, child, torch.arange(count), seed)
            report(f"{name}.weight csr (as in the checkpoint)")
    for dense, packed in attentions.items():
        exchanged[dense] = sparse_attention(dense, packed, exchanged.get(dense.out_proj, dense.out_proj))
    exchange(module, exchanged)
    if exchanged:
        module.__dict__[_CHOSEN_BY_LAYER] = True


def _restored_recurrent(
    name: str, module: nn.Module, state_dict: Mapping[str, Any], start: str, seed: int
) -> nn.Module | None:
    """A recurrent module with the sparse weights of a state dict, or None if it has them already."""
    saved = {
        n: v for n in module._parameters | module._modules if (v := state_dict.get(f"{start}{n}.values")) is not None
    }
    is_dense = f"{start}weight_ih_l0" in state_dict or bool(saved)
    sparse = {n for n, m in module.named_children() if isinstance(m, RecurrentWeight)}
    if not is_dense or sparse == set(saved):
        return None
    dense = dense_module(module) if isinstance(module, SparseRecurrent) else module
    for weight in (n for n, _ in dense.named_parameters() if n.startswith("weight")):
        report(f"{name}.{weight} {'csr' if weight in saved else 'masked'} (as in the checkpoint)")
    if not saved:
        return dense
    # The positions are placeholders: loading the state dict sets them.
    weights = {n: sparse_module(f"{name}.{n}", dense, torch.arange(v.numel()), seed) for n, v in saved.items()}
    return sparse_recurrent(dense, weights, seed)


def report(message: str, group: ProcessGroup | None = None) -> None:
    """Log a decision on rank 0, or print it to standard error if the log level hides it."""
    if rank(group) != 0:
        return
    if logger.isEnabledFor(logging.INFO):
        logger.info(message)
    else:
        print(message, file=sys.stderr)
