"""The row-order copy of a sparse layer's values, which the forward pass reads."""

from __future__ import annotations

import torch
from torch import Tensor

from dst.kernels import Engine, Pattern
from dst.nn.watched import CopyKey


class RowCopy:
    """The values of a sparse layer in row order, refreshed when the values change.

    Attributes:
        values: The copy, ``[nnz]``, or None before the first use.
        key: Identifies the copied values. None if the copy is outdated or was made for one use.
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
            fresh: Whether to copy unconditionally. In training the weights change at every step, and a write through ``values.data`` does
                not increment autograd's version counter.
        """
        # Values created in inference mode have no version counter.
        fresh = fresh or values.is_inference()
        held = self.values
        if held is None or held.shape != values.shape or held.dtype != values.dtype:
            # Training writes to this buffer later, so it must not be an inference tensor.
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
        """Refresh the copy at the next use."""
        if self.key is not None:
            self.key.valid = False
        self.key = None

    def free(self) -> None:
        """Free the memory of the copy."""
        self.outdate()
        self.values = None
