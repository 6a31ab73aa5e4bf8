"""Energy, read from the counters of the hardware.

GPUs are read through NVIDIA's library (``pip install dst[energy]``), CPUs through the counters that Linux exposes in
``/sys/class/powercap`` (RAPL), which may need permission to read. Without a counter there is no figure: dst does not
estimate energy.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dst.errors import ConfigurationError

_POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """A source of energy readings."""

    @property
    def source(self) -> str:
        """What the meter reads, in words."""

    def joules(self) -> float:
        """Energy since a fixed moment. Only differences have a meaning."""


@dataclass(frozen=True)
class Energy:
    """Measured energy of a piece of work.

    Attributes:
        joules: Energy in joules, >= 0.
        seconds: Wall time in seconds.
        sources: What was read, in words.
    """

    joules: float
    seconds: float
    sources: tuple[str, ...]

    def per(self, count: int) -> Energy:
        """Energy of one of ``count`` equal pieces of work, such as the samples of a batch.

        Raises:
            ConfigurationError: If ``count`` is below 1.
        """
        if count < 1:
            raise ConfigurationError(f"energy cannot be divided among {count} pieces of work")
        return Energy(self.joules / count, self.seconds / count, self.sources)

    def __str__(self) -> str:
        return f"{self.joules:.4g} J in {self.seconds:.4g} s ({'; '.join(self.sources)})"


def sum_energy(parts: Sequence[Energy]) -> Energy:
    """Add up the energy of several pieces of work, at least one."""
    sources = dict.fromkeys(source for part in parts for source in part.sources)
    return Energy(sum(part.joules for part in parts), sum(part.seconds for part in parts), tuple(sources))


class Rapl:
    """Reads the energy counters of all CPU packages. They count everything that runs on the machine.

    Args:
        root: Folder in which Linux exposes the counters.

    Raises:
        ConfigurationError: If there is no counter, or one cannot be read.
    """

    source = "CPU packages (RAPL; everything that runs on the machine)"

    def __init__(self, root: Path = _POWERCAP) -> None:
        zones = sorted(path.parent for path in root.glob("*rapl:*/energy_uj") if path.parent.name.count(":") == 1)
        if not zones:
            raise ConfigurationError(f"there is no RAPL counter in {root}")
        self._zones: list[tuple[Path, int]] = []
        for zone in zones:
            try:
                self._zones.append((zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())))
                self._zones[-1][0].read_text()
            except (OSError, ValueError) as error:
                raise ConfigurationError(f"the RAPL counter {zone} cannot be read: {error}") from error
        self._last = [self._read(path) for path, _ in self._zones]
        self._total = 0

    def joules(self) -> float:
        """Energy since construction. A counter wraps about once an hour; read it at least that often."""
        for i, (path, limit) in enumerate(self._zones):
            now = self._read(path)
            self._total += now - self._last[i] if now >= self._last[i] else now + limit - self._last[i]
            self._last[i] = now
        return self._total / 1e6

    @staticmethod
    def _read(path: Path) -> int:
        return int(path.read_text())


class Nvml:
    """Reads the energy counters of GPUs through NVIDIA's library. They count the work of all programs.

    Args:
        identifiers: UUIDs of the GPUs (``torch.cuda.get_device_properties(i).uuid``).

    Raises:
        ConfigurationError: If the library is not installed, or a GPU has no counter (GPUs before Volta).
    """

    def __init__(self, identifiers: list[str]) -> None:
        try:
            self._library: Any = importlib.import_module("pynvml")
        except ImportError:
            raise ConfigurationError("reading a GPU's energy needs nvidia-ml-py: pip install 'dst[energy]'") from None
        try:
            self._library.nvmlInit()
            self._handles = [self._library.nvmlDeviceGetHandleByUUID(identifier) for identifier in identifiers]
            self.joules()
        except self._library.NVMLError as error:
            raise ConfigurationError(f"the energy of {', '.join(identifiers)} cannot be read: {error}") from error

    @property
    def source(self) -> str:
        """What the meter reads, in words."""
        return f"{len(self._handles)} GPU (NVML)"

    def joules(self) -> float:
        """Energy since the driver was loaded. The counter is updated several times a second."""
        return sum(self._library.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles) / 1e3


def available_meters(device: torch.device | str = "cpu") -> list[Meter]:
    """Find the counters for a model on ``device``.

    Args:
        device: Device of the model.

    Returns:
        On a GPU, its meter, and that of the CPU if it can be read; elsewhere the meter of the CPU. Empty if the device of
        the model has no counter that can be read: the energy of the rest of the machine would mislead.
    """
    meters: list[Meter] = []
    device = torch.device(device)
    try:
        if device.type == "cuda":
            meters.append(Nvml([f"GPU-{torch.cuda.get_device_properties(device).uuid}"]))
        meters.append(Rapl())
    except ConfigurationError:
        pass  # keeps a GPU's meter where only the CPU has none
    return meters


class EnergyMeter:
    """Measures the energy of a ``with`` block.

    Args:
        device: Device of the model. A GPU is synchronized at both ends of the block.
        meters: Meters to read. Default: `available_meters`.

    Attributes:
        seconds: Wall time of the block.
        result: The `Energy` of the block; None before its end, and on machines without a counter.

    Example:
        >>> from dst.metrics import EnergyMeter
        >>> with EnergyMeter() as meter:
        ...     _ = sum(i * i for i in range(100_000))
        >>> meter.result is None or meter.result.per(100_000).joules >= 0
        True
    """

    def __init__(self, device: torch.device | str = "cpu", meters: Sequence[Meter] | None = None) -> None:
        self.device = torch.device(device)
        self.meters = available_meters(self.device) if meters is None else meters
        self.seconds = 0.0
        self.result: Energy | None = None
        self._before: tuple[float, float] = (0.0, 0.0)

    def __enter__(self) -> EnergyMeter:
        self._before = self._read()
        return self

    def __exit__(self, *args: Any) -> None:
        joules, seconds = self._read()
        self.seconds = seconds - self._before[1]
        if self.meters:
            self.result = Energy(joules - self._before[0], self.seconds, tuple(m.source for m in self.meters))

    def _read(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return sum(meter.joules() for meter in self.meters), time.perf_counter()
