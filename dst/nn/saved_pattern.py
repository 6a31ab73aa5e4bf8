"""The positions of a sparse layer's non-zeros in a state_dict: written, read and checked.

The order by columns is saved, as int32 ``column_pointers`` ``[in + 1]`` and ``row_indices`` ``[nnz]``. The order by rows
follows from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dst.kernels import Pattern

NAMES = ("column_pointers", "row_indices")


def saved_pattern(pattern: Pattern) -> dict[str, Tensor]:
    """Return the entries of a state_dict that hold ``pattern``."""
    return {"column_pointers": pattern.column_pointers, "row_indices": pattern.row_indices.to(torch.int32)}


def flat_of_saved(pointers: Tensor, rows: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the sorted flat indices, int64 ``[nnz]``, of a saved pattern for a weight of ``shape`` ``(out, in)``.

    Raises:
        ValueError: The entries are damaged or belong to another shape; the message says how.
    """
    outputs, inputs = shape
    pointers, rows = pointers.to(torch.int64), rows.to(torch.int64)
    if pointers.shape != (inputs + 1,):
        raise ValueError(f"saved for {pointers.numel() - 1} inputs, this layer has {inputs}")
    counts = pointers.diff()
    if int(pointers[0]) != 0 or bool((counts < 0).any()) or int(pointers[-1]) != rows.numel():
        raise ValueError("the saved column pointers are damaged")
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < outputs:
        raise ValueError(f"saved rows reach {int(rows.max())}, this layer has {outputs} outputs")
    columns = torch.repeat_interleave(torch.arange(inputs), counts)
    if not bool(((columns * outputs + rows).diff() > 0).all()):
        raise ValueError("the saved row indices are not sorted within their columns")
    return (rows * inputs + columns).sort().values


def flat_of_masked(dense: Tensor, present: Pattern) -> Tensor:
    """Return the sorted flat indices of a masked weight's active weights, as many as ``present`` has.

    An active weight may be zero, which the dense weight does not tell from an inactive one: positions of the present
    pattern make up for the difference. A sparsifier's state, loaded afterwards, sets them right.

    Raises:
        ValueError: The weight has more non-zeros than ``present``.
    """
    found = dense.detach().reshape(-1).nonzero().squeeze(1).cpu()
    spare = present.nnz - found.numel()
    if spare < 0:
        raise ValueError(
            f"saved with {found.numel()} non-zeros, this layer holds {present.nnz}; load weights of a dense model before "
            "dst.prepare"
        )
    flat = present.flat()
    unused = flat[~torch.isin(flat, found)][:spare]
    return torch.cat([found, unused]).sort().values
