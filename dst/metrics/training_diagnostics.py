r"""Diagnostics of gradients and losses as torchmetrics classes: they accumulate over updates and processes.

Reduced gradients are the same on all processes. Losses differ between processes and are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dst.errors import ConfigurationError
from dst.metrics import training


class GradientNorms(Metric):
    r"""Gradient norms on active and on inactive weights, root mean square over calls; see `dst.metrics.gradient_norms`.

    .. math:: g = \Bigl(\frac{1}{T} \sum_t \sum_l \| G_l^t \odot M_l^t \|^2\Bigr)^{1/2}

    Gradients must be dense and reduced over processes.

    Example:
        >>> import torch
        >>> from dst.metrics import GradientNorms
        >>> metric = GradientNorms()
        >>> metric.update({"w": torch.tensor([3.0, 4.0, 12.0])}, {"w": torch.tensor([True, True, False])})
        >>> metric.compute()
        {'active': tensor(5.), 'inactive': tensor(12.)}
    """

    full_state_update = False
    is_differentiable = False

    squares: Tensor
    updates: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("squares", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("updates", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, gradients: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Add gradients and masks by name."""
        self.squares += torch.stack(training.gradient_squares(gradients, masks)).to(self.squares)
        self.updates += 1

    def compute(self) -> dict[str, Tensor]:
        """Return ``active`` and ``inactive``: scalars, >= 0."""
        active, inactive = (self.squares / self.updates.clamp(min=1)).sqrt().float()
        return {"active": active, "inactive": inactive}


class LossSpikes(Metric):
    r"""Relative rise of the loss after topology updates, mean over updates; see `dst.metrics.loss_spikes`.

    .. math:: s_u = \frac{\max_{0 < i \le w} \ell_{u + i}}{\frac{1}{w} \sum_{0 \le i < w} \ell_{u - i}} - 1

    Losses are averaged over processes first. All processes must have taken the same number of steps.

    Args:
        window: Number w of steps before and after an update, at least 1.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> from dst.metrics import LossSpikes
        >>> metric = LossSpikes(window=2)
        >>> for step, loss in enumerate([1.0, 1.0, 1.0, 3.0, 2.0]):
        ...     metric.update(loss, updated=step == 2)
        >>> metric.compute()
        tensor(2.)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    losses: list[Tensor] | Tensor
    updated: list[Tensor] | Tensor
    steps: Tensor

    def __init__(self, window: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if window < 1:
            raise ConfigurationError(f"window={window} must be at least 1")
        self.window = window
        self.add_state("losses", [], dist_reduce_fx="cat")
        self.add_state("updated", [], dist_reduce_fx="cat")
        self.add_state("steps", torch.zeros((), dtype=torch.int64), dist_reduce_fx=None)  # of every process

    def update(self, loss: Tensor | float, updated: bool) -> None:
        """Add the loss of an optimizer step, and whether that step updated the topology."""
        assert isinstance(self.losses, list)
        assert isinstance(self.updated, list)
        self.losses.append(torch.as_tensor(loss, device=self.device).detach().double().reshape(1))
        self.updated.append(torch.tensor([int(updated)], device=self.device))
        self.steps += 1

    def compute(self) -> Tensor:
        """Return a scalar; NaN if no update has a full window before it.

        Raises:
            ConfigurationError: If the processes took different numbers of steps.
        """
        steps = self.steps.flatten().tolist()
        if len(set(steps)) > 1:
            raise ConfigurationError(
                f"the processes took different numbers of steps ({steps}): update the metric on all of them"
            )
        losses, updated = (dim_zero_cat(x).reshape(len(steps), -1) for x in (self.losses, self.updated))
        updates = updated.amax(0).nonzero().flatten().tolist()
        spikes = training.loss_spikes(losses.mean(0), updates, self.window)
        return spikes.mean() if len(spikes) else torch.tensor(float("nan"))
