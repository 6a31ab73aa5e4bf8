"""Writing, reading and checking the pattern of a sparse layer in a state_dict.

The pattern is saved in column order, as int32 ``column_pointers`` ``[in + 1]`` and ``row_indices`` ``[nnz]``. The row order
is computed from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dst.kernels import Pattern

NAMES = ("column_pointers", "row_indices")


def saved_pattern(pattern: Pattern) -> dict[str, Tensor]:
    """Return the state_dict entries of ``pattern``."""
    return {"column_pointers": pattern.column_pointers, "row_indices": pattern.row_indices.to(torch.int32)}


def flat_of_saved(pointers: Tensor, rows: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the sorted flat indices, int64 ``[nnz]``, of a saved pattern for a weight of ``shape`` ``(out, in)``.

    Raises:
        ValueError: The entries are damaged, or the weight had another shape.
    """
    outputs, inputs = shape
    pointers, rows = pointers.to(torch.int64), rows.to(torch.int64)
    if pointers.shape != (inputs + 1,):
        raise ValueError(f"saved with {pointers.numel() - 1} inputs, this layer has {inputs}")
    counts = pointers.diff()
    if int(pointers[0]) != 0 or bool((counts < 0).any()) or int(pointers[-1]) != rows.numel():
        raise ValueError("the saved column pointers are damaged")
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < outputs:
        raise ValueError(f"saved row indices go up to {int(rows.max())}, this layer has {outputs} outputs")
    columns = torch.repeat_interleave(torch.arange(inputs), counts)
    if not bool(((columns * outputs + rows).diff() > 0).all()):
        raise ValueError("the saved row indices are not sorted within their columns")
    return (rows * inputs + columns).sort().values


def flat_of_masked(dense: Tensor, present: Tensor) -> Tensor:
    """Return the sorted flat indices of the active weights in a masked weight, as many as ``present``.

    A zero in the masked weight may be an active weight. If there are fewer non-zeros than active weights, positions of
    ``present`` fill up the count. Loading the sparsifier's state afterwards sets the exact positions.

    Raises:
        ValueError: The weight has more non-zeros than ``present``.
    """
    found = dense.detach().reshape(-1).nonzero().squeeze(1).cpu()
    spare = present.numel() - found.numel()
    if spare < 0:
        raise ValueError(
            f"saved with {found.numel()} non-zeros, this layer holds {present.numel()}; load weights of a dense model before "
            "dst.prepare"
        )
    unused = present[~torch.isin(present, found)][:spare]
    return torch.cat([found, unused]).sort().values
