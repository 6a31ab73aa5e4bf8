"""Arguments and modes of the forward passes that measure a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dst.topology.evaluation import evaluation_mode

Example = Tensor | Sequence[Any] | Mapping[str, Any]
"""Shape of one sample; or a batched tensor; or positional arguments of ``forward``; or keyword arguments by name."""


def forward_arguments(example: Any, like: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn an example into arguments of ``forward`` on the device of ``like``; zeros also get its dtype."""

    def move(value: Any) -> Any:
        return value.to(like.device) if isinstance(value, Tensor) else value

    if isinstance(example, Tensor):
        return (move(example),), {}
    if isinstance(example, Mapping):
        return (), {name: move(value) for name, value in example.items()}
    if all(isinstance(size, int) for size in example):
        return (torch.zeros(1, *example, dtype=like.dtype, device=like.device),), {}
    return tuple(move(value) for value in example), {}


def batch_of(example: Example, batch_size: int, like: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of ``forward`` for a batch: the samples of the example, repeated, on the device of ``like``."""

    def grow(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        copies = -(-batch_size // value.shape[0])
        return value.repeat(copies, *[1] * (value.ndim - 1))[:batch_size]

    return tree_map(grow, forward_arguments(example, like))


@contextmanager
def unfused_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without the fused fast path of encoder layers, which does not call submodules."""
    fused = torch.backends.mha.get_fastpath_enabled()
    with evaluation_mode(model):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients, compilation and the fused fast path. Random generators are restored."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(unfused_evaluation(model))
        yield
