"""An energy counter for tests."""

from __future__ import annotations


class Counter:
    """Gains a joule at every reading."""

    def __init__(self, source: str = "a counter") -> None:
        self.source, self._read = source, 0

    def joules(self) -> float:
        self._read += 1
        return float(self._read)
