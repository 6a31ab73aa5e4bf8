"""What many suites compare and assert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import dst
from tests.methods_list import TOTAL_STEPS


def equal(a: Any, b: Any) -> bool:
    """Whether two nested values are equal to the bit, dtypes and types included."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Yield the paths at which two nested values differ bitwise.

    Dtypes may differ: ``Optimizer.load_state_dict`` converts integers and flags to the dtype of the weights.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        left, right = (t.detach().double().numpy().tobytes() for t in (a, b))
        if a.shape != b.shape or left != right:
            yield path
    elif isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            yield from differences(a.get(key), b.get(key), f"{path}/{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{path}/{i}")
    elif type(a) is not type(b) or a != b:
        yield f"{path}: {a!r} {b!r}"


def check_inactive_are_zero(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Assert that a model's inactive weights are zero."""
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any(), name


def active_counts(sparsifier: dst.Sparsifier) -> dict[str, int]:
    """Active weights by layer, counted in the masks themselves."""
    return {layer.label: int(layer.part(sparsifier.masks[layer.parameter]).sum()) for layer in sparsifier.layers}


def check_density(active: int, density: float, weights: int, *, slack: int = 0) -> None:
    """Assert that the active weights are the fewest that reach a density, to ``slack`` weights."""
    assert -slack - 1e-6 < active - density * weights < 1 + slack, (active, density * weights)


def hooks_of(model: nn.Module) -> int:
    """How many forward hooks a model's modules have."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def settles_at(method: dst.Method) -> int | None:
    """Return the step of the update that settles a moving budget; None if the budget is fixed."""
    if method.schedule is method.surplus is None:
        return None
    last = max(method.clock.stop_step(TOTAL_STEPS), method.schedule.settles_at(TOTAL_STEPS) if method.schedule else 0)
    return min(last, TOTAL_STEPS - 1)


def check_budget(sparsifier: dst.Sparsifier, method: dst.Method) -> None:
    """Assert that the network has the method's density, as exactly as its pattern allows."""
    pattern = method.pattern_at(method.density)
    active = {row["name"]: row["nonzero"] for row in sparsifier.layer_table()}
    free = [layer for layer in sparsifier.layers if pattern.unsupported_reason(layer) is None]
    assert all(active[layer.label] == layer.weights for layer in sparsifier.layers if layer not in free)
    assert all(pattern.holds(layer, layer.part(sparsifier.masks[layer.parameter])) for layer in free)
    if not pattern.is_free:
        assert all(active[layer.label] == pattern.fit(layer, 1) for layer in free)
        return
    # Counts are whole numbers of groups, nearest to the layer's share; ablated outputs leave a remainder.
    slack = sum(pattern.fit(layer, 1) for layer in free)
    missing = method.density * sum(x.weights for x in free) - sum(active[x.label] for x in free)
    assert abs(missing) <= slack * (2 if getattr(pattern, "ablate", 0) else 1)
