"""The set of positions that have ever been active, in one bit per position."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

LARGEST = 1 << 26
_BITS = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


class Explored:
    """A set of positions that only grows.

    The set is exact up to 67 million positions. For larger layers it samples every n-th position, with n coprime to the
    row length so that all rows and columns are covered. 8 MB are enough to estimate the share to a fraction of a percent.

    Args:
        size: Number of positions.
        row: Length of a row.
        bits: The bits of a saved set of the same size.
    """

    def __init__(self, size: int, row: int, bits: Tensor | None = None) -> None:
        self._size, self._every = size, max(1, math.ceil(size / LARGEST))
        while math.gcd(self._every, row) != 1:
            self._every += 1
        self._slots = math.ceil(size / self._every)
        self.bits = torch.zeros(math.ceil(self._slots / 8), dtype=torch.uint8) if bits is None else bits.clone()

    def add(self, positions: Tensor) -> None:
        """Add positions (int64)."""
        if self._every > 1:
            positions = positions[positions % self._every == 0] // self._every
        slots = positions.numpy()
        np.bitwise_or.at(self.bits.numpy(), slots >> 3, np.left_shift(1, slots & 7).astype(np.uint8))

    def count(self, start: int = 0, stop: int | None = None) -> float:
        """Number of positions of [``start``, ``stop``) in the set, by default of all; an estimate if the set is sampled."""
        if stop is not None:
            inside = self.positions()
            return int(((inside >= start) & (inside < stop)).sum()) * self._every
        found = int(_BITS[self.bits.numpy()].sum(dtype=np.int64))
        return found if self._every == 1 else found * self._size / self._slots

    def positions(self) -> Tensor:
        """The sampled positions in the set, sorted."""
        found = np.flatnonzero(np.unpackbits(self.bits.numpy(), bitorder="little")[: self._slots])
        return torch.from_numpy(found) * self._every
