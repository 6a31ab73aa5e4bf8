"""Memory, energy and wall time of a fit."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from dst.metrics.energy import Energy, EnergyMeter
from dst.metrics.memory import PeakMemory


class Spent(Callback):
    """Measures memory, energy and wall time of a fit. Counters are read at both ends, so that steps cost nothing.

    Energy and wall time are saved in checkpoints and add up over resumed runs. What was spent between the last checkpoint
    and an interruption is unknown. Memory is that of this process; energy is that of `dst.metrics.EnergyMeter`.

    Attributes:
        memory: Peak of the fit; None before its end.
        seconds_before: Wall time of training, in seconds, up to the checkpoint from which this fit resumed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory: PeakMemory | None = None
        self.seconds_before = 0.0
        self._peak: PeakMemory | None = None
        self._meter: EnergyMeter | None = None
        self._seconds: float | None = None  # of all fits so far; None before the first
        self._joules: float | None = 0.0  # None if a part was not measured
        self._sources: tuple[str, ...] = ()

    @property
    def energy(self) -> Energy | None:
        """Energy of all fits so far; ``None`` before the first, or if a part was not measured."""
        self._read()
        if self._seconds is None or self._joules is None:
            return None
        return Energy(self._joules, self._seconds, self._sources)

    def _read(self) -> None:
        """Add what was spent since the last reading."""
        if self._meter is None:
            return
        self._meter.__exit__()
        self._seconds = (self._seconds or 0.0) + self._meter.seconds
        found = self._meter.result
        if found is None or self._joules is None:
            self._joules, self._sources = None, ()
        else:
            self._joules += found.joules
            self._sources = tuple(dict.fromkeys((*self._sources, *found.sources)))
        self._meter.__enter__()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start to measure. A checkpoint has been loaded by now."""
        device = trainer.strategy.root_device
        self._meter, self._peak = EnergyMeter(device), PeakMemory(device)
        self._peak.__enter__()
        self._meter.__enter__()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop measuring."""
        if self._meter is None or self._peak is None:
            return
        self._peak.__exit__()
        if self.memory is None or self._peak.peak > self.memory.peak:
            self.memory = self._peak
        self._read()
        self._meter = self._peak = None

    def state_dict(self) -> dict[str, Any]:
        """Return wall time and energy so far as plain values; empty before the first fit."""
        self._read()
        if self._seconds is None:
            return {}
        return {"seconds": self._seconds, "joules": self._joules, "sources": list(self._sources)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state of `state_dict`."""
        if not state_dict:
            return
        self._seconds = self.seconds_before = float(state_dict["seconds"])
        # Earlier versions saved an estimate where nothing was measured.
        measured = state_dict["joules"] is not None and not state_dict.get("estimated", False)
        self._joules = float(state_dict["joules"]) if measured else None
        self._sources = tuple(state_dict["sources"]) if measured else ()
