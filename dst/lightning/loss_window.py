"""Training losses before and after topology updates."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dst.checkpoints import json_ready
from dst.metrics.training import loss_spikes

WINDOW = 10
"""Steps before and after an update whose losses are compared."""


class LossWindow:
    """Keeps the losses of the last ten steps, and compares them with those after an update.

    At most one window is open at a time. Losses stay tensors until a window closes, so that no step waits for the device.
    """

    def __init__(self) -> None:
        self._batches: list[Tensor] = []
        self._before: deque[Tensor] = deque(maxlen=WINDOW)
        self._update: int | None = None
        self._update_before: list[Tensor] = []
        self._after: list[Tensor] = []

    @property
    def last(self) -> float | None:
        """The loss of the last step; ``None`` if it is unknown or not finite."""
        return json_ready(float(self._before[-1])) if self._before else None

    @property
    def is_full(self) -> bool:
        """Whether a window is open and holds all losses after its update."""
        return self._update is not None and len(self._after) >= WINDOW

    def add_batch(self, loss: Tensor) -> None:
        """Add the loss of a batch, a scalar, to the step in progress."""
        self._batches.append(loss)

    def end_step(self, accumulated: int) -> None:
        """Take the mean over the batches since the last step, if there are any, as the loss of this step.

        Args:
            accumulated: Batches of a step, by which Lightning has divided their losses.
        """
        if not self._batches:
            return
        loss = self._batches[0] if len(self._batches) == 1 else torch.stack(self._batches).mean()
        self._batches.clear()
        if accumulated > 1:
            loss = loss * accumulated
        self._before.append(loss)
        if self._update is not None:
            self._after.append(loss)

    def open(self, update: int) -> None:
        """Begin the window of an update, after which ``update`` steps are taken; close the one before first."""
        self._update, self._update_before, self._after = update, list(self._before), []

    def close(self) -> dict[str, Any] | None:
        """End the window.

        Returns:
            ``update``, the mean loss ``before``, the largest ``after`` and their ``spike`` (see
            `dst.metrics.loss_spikes`), with ``None`` for what is not finite; ``None`` if no window is open or too few
            losses are known.
        """
        update, before, after = self._update, _floats(self._update_before), _floats(self._after)
        self._update = None
        spike = loss_spikes([*before, *after], [len(before) - 1], WINDOW) if before else torch.zeros(0)
        if update is None or not len(spike):
            return None
        return {
            "update": update,
            "before": json_ready(sum(before) / len(before)),
            "after": json_ready(max(after)),
            "spike": json_ready(float(spike[0])),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the losses and the open window as plain values."""
        return {
            "batches": _floats(self._batches),
            "before": _floats(self._before),
            "update": self._update,
            "update_before": _floats(self._update_before),
            "after": _floats(self._after),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`'s result; other keys are ignored."""
        self._batches, self._update_before, self._after = (
            _tensors(state[name]) for name in ("batches", "update_before", "after")
        )
        self._before = deque(_tensors(state["before"]), maxlen=WINDOW)
        self._update = state["update"]


def loss_of(outputs: Any) -> Tensor | None:
    """Return the loss among the outputs of a training step, a scalar without its graph, or ``None``."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return None
    return loss.detach() if loss.requires_grad else loss


def _floats(losses: Sequence[Tensor] | deque[Tensor]) -> list[float]:
    return torch.stack([x.reshape(()).float() for x in losses]).tolist() if losses else []


def _tensors(losses: Sequence[float]) -> list[Tensor]:
    return [torch.tensor(loss) for loss in losses]
