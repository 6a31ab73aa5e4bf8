"""Which backend stores each layer. ``dst.prepare`` and ``dst.plan`` decide by the same function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from torch import nn

from dst.backends.csr_support import owners_of, unsupported_reasons
from dst.topology.layers import SparseLayer, sparse_modules


class Decision(NamedTuple):
    """The storage of one layer.

    Attributes:
        storage: ``"csr"``, ``"masked"``, ``"dense"`` if all weights stay active, or ``"auto"`` if it is measured once scores
            have decided how many are active.
        reason: Why it is not csr, or what was measured. May be empty.
    """

    storage: str
    reason: str


_KEPT = Decision("dense", "keeps all its weights")

Choose: TypeAlias = Callable[[Sequence[SparseLayer], nn.Module, int], Decision]
"""Decides for the layers that one dense module stores, from their number of active weights."""


def decide(
    model: nn.Module, layers: Sequence[SparseLayer], active: Sequence[int | None], choose: Choose | None = None
) -> dict[str, Decision]:
    """Decide the storage of each layer.

    An attention module stores q, k and v together, so they are decided together. Its output projection can only be stored
    by its non-zeros if they are.

    Args:
        model: The model.
        layers: Its sparse layers.
        active: Number of active weights of each layer; ``None`` if it is not known yet.
        choose: Decides for layers that csr supports and that do not keep all their weights. If None, they are csr.

    Returns:
        Layer label to decision.
    """
    owners, stored, unsupported = owners_of(model), sparse_modules(model), unsupported_reasons(model, layers)
    attention = {m.out_proj: m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    parts: dict[str, list[tuple[SparseLayer, int | None]]] = {}
    for layer, count in zip(layers, active, strict=True):
        parts.setdefault(layer.parameter, []).append((layer, count))
    storages: dict[nn.Module, str] = {}
    found: dict[str, Decision] = {}
    for parameter, held in parts.items():
        if parameter in stored:
            found.update((layer.label, Decision("csr", "")) for layer, _ in held)
            continue
        module = owners[parameter][0]
        # Only attention has several layers that csr supports in one weight.
        reasons = [unsupported[layer.label] for layer, _ in held]
        if any(reasons):
            decisions = [Decision("masked", reason or "") for reason in reasons]
        elif all(count == layer.weights for layer, count in held):
            decisions = [_KEPT] * len(held)
        elif module in attention and storages.get(attention[module]) not in ("csr", "auto"):
            decisions = [Decision("masked", "q, k and v are not sparse")] * len(held)
        else:
            decisions = [_chosen(held, module, choose)] * len(held)
        storages[module] = decisions[0].storage
        for (layer, count), decision in zip(held, decisions, strict=True):
            found[layer.label] = _KEPT if count == layer.weights else decision
    return found


def _chosen(held: Sequence[tuple[SparseLayer, int | None]], module: nn.Module, choose: Choose | None) -> Decision:
    if choose is None:
        return Decision("csr", "")
    known = [count for _, count in held if count is not None]
    if len(known) < len(held):
        return Decision("auto", "measured when scores have set its density")
    return choose([layer for layer, _ in held], module, sum(known))
