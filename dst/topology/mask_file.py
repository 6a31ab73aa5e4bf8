"""Mask files. They hold plain tensors; loading one executes no code from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dst.checkpoints import reason_of, save_atomically
from dst.errors import StateError


def save_masks(masks: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write masks to a file, atomically.

    Args:
        masks: Parameter name to bool tensor, such as ``Sparsifier.masks``.
        path: The file. An existing file is replaced.
    """
    save_atomically({name: mask.detach().bool().cpu() for name, mask in masks.items()}, path)


def load_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read masks written by ``save_masks``.

    Args:
        path: The file.

    Returns:
        Parameter name to bool tensor, on the CPU.

    Raises:
        StateError: The file does not exist or is not a mask file.
    """
    try:
        masks = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise StateError(f"no mask file at {path}; dst.save_masks writes one") from None
    except Exception as error:  # torch.load raises many types for a damaged file
        raise StateError(f"{path} is not a mask file, or is damaged: {reason_of(error)}") from None
    if not isinstance(masks, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) and v.dtype == torch.bool for k, v in masks.items()
    ):
        raise StateError(f"{path} does not hold masks (a dict of parameter name to bool tensor)")
    return masks


def is_whole(mask: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a bool mask of the given shape."""
    return mask.dtype == torch.bool and mask.shape == shape


def check_masks(
    masks: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    source: str,
    fits: Callable[[Tensor, tuple[int, ...]], bool] = is_whole,
) -> None:
    """Check that masks fit a model's sparse parameters.

    Args:
        masks: Name to mask.
        shapes: Name of every sparse parameter to its dense shape.
        source: Where the masks come from, for messages.
        fits: Whether a tensor is a mask of a shape.

    Raises:
        StateError: A mask is missing, unknown, or has another shape.
    """
    if masks.keys() != shapes.keys():
        missing, extra = sorted(shapes.keys() - masks.keys()), sorted(masks.keys() - shapes.keys())
        raise StateError(
            f"{source} does not fit the model: "
            + "; ".join(t for t in (missing and f"lacks {missing}", extra and f"has unknown {extra}") if t)
        )
    for name, shape in shapes.items():
        mask = masks[name]
        if not isinstance(mask, Tensor) or not fits(mask, shape):
            found = f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise StateError(f"{source} has {name} as {found}, the model as {shape}")
