"""The copy in row order that a sparse layer's forward pass reads."""

from __future__ import annotations

import torch
from torch import Tensor

from dst.kernels import Engine, Pattern
from dst.nn.watched import CopyKey


class RowCopy:
    """The values of a sparse layer in row order, renewed when they have changed.

    Attributes:
        values: The copy, ``[nnz]``, or None before the first use.
        key: Identifies the values that were copied; None if the copy is outdated or was made for one use.
    """

    def __init__(self) -> None:
        self.values: Tensor | None = None
        self.key: CopyKey | None = None

    def of(self, values: Tensor, pattern: Pattern, engine: Engine, *, fresh: bool) -> Tensor:
        """Return ``values`` in row order, ``[nnz]``.

        Args:
            values: The values in column order, ``[nnz]``, detached.
            pattern: Positions of the non-zeros.
            engine: Makes the copy.
            fresh: Copy in any case. In training the weights change at every step, and a write through ``values.data``
                does not raise autograd's version.
        """
        # Values made inside inference mode have no version.
        fresh = fresh or values.is_inference()
        held = self.values
        if held is None or held.shape != values.shape or held.dtype != values.dtype:
            # Outside inference mode even if called inside it: training will write to this memory.
            with torch.inference_mode(False):
                held = torch.empty(values.shape, dtype=values.dtype)
            self.free()
            self.values = held
        key = self.key
        if fresh or key is None or (key.address, key.version) != (values.data_ptr(), values._version):
            self.outdate()
            engine.refresh(pattern, values, held)
            self.key = None if fresh else CopyKey(values)
        return held

    def outdate(self) -> None:
        """Renew the copy at the next use."""
        if self.key is not None:
            self.key.valid = False
        self.key = None

    def free(self) -> None:
        """Give the memory of the copy back."""
        self.outdate()
        self.values = None
