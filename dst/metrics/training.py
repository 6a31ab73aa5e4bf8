"""Diagnostics of gradients and losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.metrics.topology import as_masks


def gradient_squares(gradients: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sums of squares over active and over inactive weights, in float64; see `gradient_norms`."""
    as_masks(masks)
    if missing := [name for name in masks if name not in gradients]:
        raise ConfigurationError(
            f"there is no gradient of {', '.join(missing)}: compute it before, or leave the mask out"
        )
    active = inactive = torch.zeros((), dtype=torch.float64)
    for name, mask in masks.items():
        gradient = gradients[name].detach()
        if gradient.shape != mask.shape:
            raise ConfigurationError(
                f"the gradient of {name} has shape {tuple(gradient.shape)}, its mask {tuple(mask.shape)}"
            )
        squares = gradient.double().square()
        part = squares[mask.to(squares.device)].sum()
        active, inactive = active + part.cpu(), inactive + (squares.sum() - part).cpu().clamp(min=0)
    return active, inactive


def gradient_norms(gradients: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    r"""Euclidean norms of the gradient on active and on inactive weights.

    .. math:: g_\mathrm{on} = \Bigl(\sum_l \| G_l \odot M_l \|^2\Bigr)^{1/2} \qquad
        g_\mathrm{off} = \Bigl(\sum_l \| G_l \odot (1 - M_l) \|^2\Bigr)^{1/2}

    A large norm on inactive weights means that other connections would reduce the loss. It needs dense gradients, which
    exist between ``backward()`` and ``Sparsifier.before_step()``.

    Args:
        gradients: Name -> gradient, of the shape of the mask.
        masks: Name -> bool tensor.

    Returns:
        Two scalars, >= 0, float32.

    Raises:
        ConfigurationError: If a gradient is missing or of another shape, or a mask is not a bool tensor.

    Example:
        >>> import torch
        >>> from dst.metrics import gradient_norms
        >>> gradient_norms({"w": torch.tensor([3.0, 4.0, 12.0])}, {"w": torch.tensor([True, True, False])})
        (tensor(5.), tensor(12.))
    """
    active, inactive = gradient_squares(gradients, masks)
    return active.sqrt().float(), inactive.sqrt().float()


def loss_spikes(losses: Tensor | Sequence[float], updates: Iterable[int], window: int = 10) -> Tensor:
    r"""Relative rise of the loss after topology updates.

    .. math:: s_u = \frac{\max_{0 < i \le w} \ell_{u + i}}{\frac{1}{w} \sum_{0 \le i < w} \ell_{u - i}} - 1

    An update at step u follows the loss of that step, so step u + 1 is the first with the new topology.

    Args:
        losses: Training loss of every optimizer step, from step 0; shape (steps,).
        updates: Steps of the updates. An update with fewer than w losses before it, or none after it, is left out.
        window: Number w of steps before and after an update, at least 1.

    Returns:
        Float32 tensor with an entry per update: 0 if the loss stayed at its mean, 1 if it doubled.

    Raises:
        ConfigurationError: If the window is below 1, or an update is before step 0.

    Example:
        >>> import torch
        >>> from dst.metrics import loss_spikes
        >>> loss_spikes([1.0, 1.0, 1.0, 3.0, 2.0, 1.0], updates=[2], window=2)
        tensor([2.])
    """
    if window < 1:
        raise ConfigurationError(f"window={window} must be at least 1")
    losses = torch.as_tensor(losses, dtype=torch.float64).flatten()
    spikes = []
    for step in updates:
        if step < 0:
            raise ConfigurationError(f"an update at step {step}: steps count from 0")
        before, after = losses[max(0, step + 1 - window) : step + 1], losses[step + 1 : step + 1 + window]
        if len(before) == window and step < len(losses) and len(after):
            spikes.append(after.max() / before.mean() - 1)
    return torch.stack(spikes).float() if spikes else torch.zeros(0)
