"""Energy: read from the hardware's counters where there are any, and else estimated and called so.

GPUs are read by NVIDIA's own library (``pip install dst[energy]``), CPUs by the counters that Linux shows at
``/sys/class/powercap`` (RAPL; reading them may need permission). Without either, the CPU's time is multiplied by watts that
are assumed, and every figure says that.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dst.errors import ConfigurationError

WATTS_PER_CORE = 10.0
"""Assumed power of one busy CPU core, with its share of caches and memory, where nothing is measured."""

_POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """A source of energy readings."""

    @property
    def source(self) -> str:
        """What is read, in words."""

    @property
    def estimated(self) -> bool:
        """Whether it is an estimate and no measurement."""

    def joules(self) -> float:
        """Reading since some fixed moment: differences count."""


@dataclass(frozen=True)
class Energy:
    """What a stretch of work took.

    Attributes:
        joules: Energy.
        seconds: Wall time.
        sources: What was read, in words; an estimate says what it assumes.
        estimated: Whether any of it is an estimate.
    """

    joules: float
    seconds: float
    sources: tuple[str, ...]
    estimated: bool

    def per(self, count: int) -> Energy:
        """The same for one of ``count`` equal pieces of work, such as the samples of a batch.

        Raises:
            ConfigurationError: A count below 1.
        """
        if count < 1:
            raise ConfigurationError(f"energy cannot be divided among {count} pieces of work")
        return Energy(self.joules / count, self.seconds / count, self.sources, self.estimated)

    def __str__(self) -> str:
        label = "estimate" if self.estimated else "measured"
        return f"{self.joules:.4g} J in {self.seconds:.4g} s ({label}: {'; '.join(self.sources)})"


def sum_energy(parts: Sequence[Energy]) -> Energy:
    """Energy of several stretches of work, at least one, by the same meters."""
    total = sum(part.joules for part in parts), sum(part.seconds for part in parts)
    return Energy(*total, parts[0].sources, any(part.estimated for part in parts))


class CpuTime:
    """Estimates by the CPU time of this process and of its children that have ended.

    Args:
        watts_per_core: Power of a busy core.
    """

    estimated = True

    def __init__(self, watts_per_core: float = WATTS_PER_CORE) -> None:
        if not watts_per_core > 0:
            raise ConfigurationError(f"watts_per_core={watts_per_core} must be positive")
        self.watts_per_core = watts_per_core

    @property
    def source(self) -> str:
        """What is assumed."""
        return f"CPU time at an assumed {self.watts_per_core:g} W per busy core"

    def joules(self) -> float:
        """Core-seconds so far, times watts."""
        ended = os.times()  # of children only: its ticks are too coarse for a few forward passes
        return (time.process_time() + ended.children_user + ended.children_system) * self.watts_per_core


class Rapl:
    """Reads the energy counters of all CPU packages, which other work on the machine moves too.

    Args:
        root: Where Linux shows them.

    Raises:
        ConfigurationError: There is no counter that can be read.
    """

    estimated = False
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
        """Energy since this object was made. Read it at least once in the hour or so in which a counter wraps."""
        for i, (path, limit) in enumerate(self._zones):
            now = self._read(path)
            self._total += now - self._last[i] if now >= self._last[i] else now + limit - self._last[i]
            self._last[i] = now
        return self._total / 1e6

    @staticmethod
    def _read(path: Path) -> int:
        return int(path.read_text())


class Nvml:
    """Reads the energy counters of GPUs by NVIDIA's library.

    Args:
        identifiers: UUIDs of the GPUs (``torch.cuda.get_device_properties(i).uuid``); other programs' work on them counts.

    Raises:
        ConfigurationError: The library is not installed, or a GPU has no counter (those before Volta).
    """

    estimated = False

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
        """What is read."""
        return f"{len(self._handles)} GPU (NVML)"

    def joules(self) -> float:
        """Energy since the driver was loaded; the counter moves several times a second."""
        return sum(self._library.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles) / 1e3


def available_meters(device: torch.device | str = "cpu", watts_per_core: float = WATTS_PER_CORE) -> list[Meter]:
    """The best readings that this machine gives: counters of the GPU in use and of the CPU, and else an estimate.

    Args:
        device: Where the model runs.
        watts_per_core: Power that is assumed of a busy core where the CPU has no counter that can be read.

    Returns:
        One meter for the CPU, and one for the GPU if the model runs on one. Without a library for the GPU the meter says
        so and reads nothing, which makes the figure an estimate.
    """
    meters: list[Meter] = []
    device = torch.device(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        meters.append(_or_missing(lambda: Nvml([f"GPU-{properties.uuid}"]), "the GPU"))
    try:
        meters.append(Rapl())
    except ConfigurationError:
        meters.append(CpuTime(watts_per_core))
    return meters


@dataclass(frozen=True)
class _Missing:
    """Stands for hardware that cannot be read."""

    source: str
    estimated: bool = True

    def joules(self) -> float:
        return 0.0


def _or_missing(make: Callable[[], Meter], what: str) -> Meter:
    try:
        return make()
    except ConfigurationError as error:
        return _Missing(f"without {what}, which is not counted: {error}")


class EnergyMeter:
    """Measures the energy within a ``with`` block.

    Args:
        device: Where the model runs; a GPU is waited for at both ends.
        meters: What to read; by default `available_meters`.

    Attributes:
        result: The `Energy`, after the block.

    Example:
        >>> from dst.metrics import EnergyMeter
        >>> with EnergyMeter() as meter:
        ...     _ = sum(i * i for i in range(100_000))
        >>> meter.result.per(100_000).joules >= 0
        True
    """

    def __init__(self, device: torch.device | str = "cpu", meters: list[Meter] | None = None) -> None:
        self.device = torch.device(device)
        self.meters = available_meters(self.device) if meters is None else meters
        if not self.meters:
            raise ConfigurationError("there is no meter to read")
        self.result = Energy(0.0, 0.0, tuple(m.source for m in self.meters), any(m.estimated for m in self.meters))
        self._before: tuple[float, float] = (0.0, 0.0)

    def __enter__(self) -> EnergyMeter:
        self._before = self._read()
        return self

    def __exit__(self, *args: Any) -> None:
        joules, seconds = self._read()
        sources, estimated = self.result.sources, self.result.estimated
        self.result = Energy(joules - self._before[0], seconds - self._before[1], sources, estimated)

    def _read(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return sum(meter.joules() for meter in self.meters), time.perf_counter()
