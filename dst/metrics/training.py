r"""What training does to a topology's gradients and losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.metrics.topology import as_masks


def gradient_squares(gradients: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sums of squares over active and over inactive weights, in double precision; see `gradient_norms`."""
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

    A large second norm says that other connections would help. It exists only where the gradient is dense: between
    ``backward()`` and ``Sparsifier.before_step()``.

    Args:
        gradients: Name to gradient, of the masks' shapes.
        masks: Name to bool tensor.

    Returns:
        Two scalars, >= 0, float32.

    Raises:
        ConfigurationError: A gradient that is missing or of another shape, or something that is no bool tensor.

    Example:
        >>> import torch
        >>> from dst.metrics import gradient_norms
        >>> gradient_norms({"w": torch.tensor([3.0, 4.0, 12.0])}, {"w": torch.tensor([True, True, False])})
        (tensor(5.), tensor(12.))
    """
    active, inactive = gradient_squares(gradients, masks)
    return active.sqrt().float(), inactive.sqrt().float()


def loss_spikes(losses: Tensor | Sequence[float], updates: Iterable[int], window: int = 10) -> Tensor:
    r"""How far the loss rises after topology updates.

    .. math:: s_u = \frac{\max_{0 < i \le w} \ell_{u + i}}{\frac{1}{w} \sum_{0 \le i < w} \ell_{u - i}} - 1

    An update at step u comes after that step's loss was computed, so step u + 1 is the first to see it.

    Args:
        losses: Training loss of every optimizer step, from step 0; shape (steps,).
        updates: Steps of the updates. One that has fewer than w losses before it, or none after it, is left out.
        window: Steps w before and after, at least 1.

    Returns:
        Float tensor, one number per update that counts: 0 where the loss stayed at its mean, 1 where it doubled.

    Raises:
        ConfigurationError: A window below 1, or an update before step 0.

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
