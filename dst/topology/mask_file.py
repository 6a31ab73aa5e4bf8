"""Masks in a file: plain tensors, read without executing anything that the file brings."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from dst.checkpoints import reason_of, save_atomically
from dst.errors import StateError


def save_masks(masks: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write masks atomically.

    Args:
        masks: Parameter name to bool tensor, as ``Sparsifier.masks`` gives them.
        path: The file to write; an older one is replaced in one move.
    """
    save_atomically({name: mask.detach().bool().cpu() for name, mask in masks.items()}, path)


def load_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read masks written by ``save_masks``.

    Args:
        path: The file.

    Returns:
        Parameter name to bool tensor, on the CPU.

    Raises:
        StateError: No such file, or not one of masks; nothing in it is executed.
    """
    try:
        masks = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise StateError(f"no mask file at {path}; dst.save_masks writes one") from None
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise StateError(f"{path} is not a mask file, or is damaged: {reason_of(error)}") from None
    if not isinstance(masks, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) and v.dtype == torch.bool for k, v in masks.items()
    ):
        raise StateError(f"{path} does not hold masks (a dict of parameter name to bool tensor)")
    return masks
