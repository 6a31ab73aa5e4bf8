"""What a fit takes of memory and energy."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from dst.metrics.energy import Energy, EnergyMeter
from dst.metrics.memory import PeakMemory


class Spent(Callback):
    """Measures memory and energy of a fit by counters that are read at both its ends, at no cost in between.

    Energy goes into checkpoints, so that a resumed run knows what it took before; what was spent between the last checkpoint
    and an interruption is not known. Memory is this process's, the energy that of ``dst.metrics.EnergyMeter``.

    Attributes:
        memory: The fit's peak; None before its end.
        energy: Of all fits so far; None before the first one's end.
        seconds_before: Wall time of training up to the checkpoint that it goes on from.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory: PeakMemory | None = None
        self._peak: PeakMemory | None = None
        self._meter: EnergyMeter | None = None
        self._before = (0.0, 0.0)  # joules and seconds of fits that were resumed, or that ended
        self.seconds_before = 0.0
        self._sources: tuple[str, ...] = ()
        self._estimated = False

    @property
    def energy(self) -> Energy | None:
        """Energy of all fits so far."""
        if self._meter is not None:
            self._read()
        return Energy(*self._before, self._sources, self._estimated) if self._sources else None

    def _read(self) -> None:
        """Add what was spent since the last reading."""
        assert self._meter is not None
        self._meter.__exit__()
        found = self._meter.result
        self._before = self._before[0] + found.joules, self._before[1] + found.seconds
        self._sources, self._estimated = found.sources, self._estimated or found.estimated
        self._meter.__enter__()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin: a checkpoint is loaded by now."""
        device = trainer.strategy.root_device
        self._meter, self._peak = EnergyMeter(device), PeakMemory(device)
        self._peak.__enter__()
        self._meter.__enter__()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """End."""
        if self._meter is None or self._peak is None:
            return
        self._peak.__exit__()
        if self.memory is None or self._peak.peak > self.memory.peak:
            self.memory = self._peak
        self._read()
        self._meter = self._peak = None

    def state_dict(self) -> dict[str, Any]:
        """Energy so far, as plain values."""
        found = self.energy
        if found is None:
            return {}
        return {
            "joules": found.joules,
            "seconds": found.seconds,
            "sources": list(found.sources),
            "estimated": found.estimated,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`'s result."""
        if state_dict:
            self._before = float(state_dict["joules"]), float(state_dict["seconds"])
            self.seconds_before = self._before[1]
            self._sources, self._estimated = tuple(state_dict["sources"]), bool(state_dict["estimated"])
