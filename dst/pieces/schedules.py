"""Schedules: when the topology is updated (clocks), the drop fraction, and the density over time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dst.errors import ConfigurationError
from dst.pieces.durations import Duration, check_duration, resolve_steps


@dataclass(frozen=True)
class Never:
    """No topology updates."""

    def fires(self, step: int, total_steps: int) -> bool:
        """Return False."""
        return False

    def stop_step(self, total_steps: int) -> int:
        """Return 0."""
        return 0


@dataclass(frozen=True)
class Every:
    """An update every ``every`` steps in [start, stop).

    Steps are optimizer steps, counted from 0. The published defaults are ΔT = 100 and updates until 75% of training (Evci
    et al. 2020, section 4).

    Deviation: the authors' interval includes its end. Here it does not, so ``stop=1.0`` equals ``stop=total_steps``.

    Attributes:
        every: ΔT, steps between updates: an int >= 1 or a fraction of the total steps.
        start: First step that may update the topology.
        stop: First step that may no longer update the topology.

    Raises:
        ConfigurationError: A duration is out of range, or ``every`` is 0.
    """

    every: Duration = 100
    start: Duration = 0
    stop: Duration = 0.75

    def __post_init__(self) -> None:
        for name in ("every", "start", "stop"):
            check_duration(getattr(self, name), {"every": "update_every"}.get(name, name))
        if self.every == 0:
            raise ConfigurationError("update_every=0: updates need at least one step between them")

    def fires(self, step: int, total_steps: int) -> bool:
        """Return whether ``step`` is one of start, start + every, … before stop."""
        start = resolve_steps(self.start, total_steps, "start")
        every = max(1, resolve_steps(self.every, total_steps, "update_every"))
        return start <= step < self.stop_step(total_steps) and (step - start) % every == 0

    def stop_step(self, total_steps: int) -> int:
        """Return ``stop`` in steps."""
        return resolve_steps(self.stop, total_steps, "stop")


@dataclass(frozen=True)
class _Decay:
    """A drop fraction that starts at ``initial``, in [0, 1]."""

    initial: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= 1:
            raise ConfigurationError(f"initial drop fraction {self.initial} must lie in [0, 1]")

    def _progress(self, step: int, stop: int) -> float:
        return min(1.0, step / stop) if stop > 0 else 1.0


@dataclass(frozen=True)
class Constant(_Decay):
    """A constant drop fraction (SET, Mocanu et al. 2018).

    Attributes:
        initial: Drop fraction, in [0, 1].
    """

    def __call__(self, step: int, stop: int) -> float:
        """Return ``initial``."""
        return self.initial


@dataclass(frozen=True)
class Cosine(_Decay):
    """α/2 · (1 + cos(π · t / T_stop)) (Evci et al. 2020, section 3).

    Attributes:
        initial: α, drop fraction at step 0, in [0, 1].
    """

    def __call__(self, step: int, stop: int) -> float:
        """Return the fraction at ``step``, for updates in steps before ``stop``."""
        return self.initial / 2 * (1 + math.cos(math.pi * self._progress(step, stop)))


@dataclass(frozen=True)
class InversePower(_Decay):
    """α · (1 − t / T_stop)^k (Evci et al. 2020, appendix on update schedules).

    Attributes:
        initial: α, drop fraction at step 0, in [0, 1].
        power: k, > 0; the authors use 3.
    """

    power: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power <= 0:
            raise ConfigurationError(f"power={self.power} of the inverse-power fraction must be positive")

    def __call__(self, step: int, stop: int) -> float:
        """Return the fraction at ``step``, for updates in steps before ``stop``."""
        return float(self.initial * (1 - self._progress(step, stop)) ** self.power)


@dataclass(frozen=True)
class Linear(_Decay):
    """α · (1 − t / T_stop): inverse power with k = 1.

    Attributes:
        initial: α, drop fraction at step 0, in [0, 1].
    """

    def __call__(self, step: int, stop: int) -> float:
        """Return the fraction at ``step``, for updates in steps before ``stop``."""
        return self.initial * (1 - self._progress(step, stop))


@dataclass(frozen=True)
class Cubic:
    """A density that changes fast, then slowly: gradual pruning (Zhu & Gupta 2017, arXiv:1710.01878, section 3).

    The sparsity is s = s_f + (s_i - s_f) · (1 - p)^3, with p the progress in [start, stop], s_i the initial and s_f the
    final sparsity.

    Attributes:
        initial: Density until ``start``, in (0, 1].
        start: When the density begins to change.
        stop: When the density reaches the method's.
    """

    initial: float = 1.0
    start: Duration = 0
    stop: Duration = 0.75

    def __post_init__(self) -> None:
        if not 0 < self.initial <= 1:
            raise ConfigurationError(f"initial density {self.initial} must lie in (0, 1]")
        check_duration(self.start, "start")
        check_duration(self.stop, "stop")

    def __call__(self, step: int, total_steps: int, final: float) -> float:
        """Return the density after an update at ``step``, in (0, 1]."""
        start, stop = resolve_steps(self.start, total_steps), self.settles_at(total_steps)
        if step >= stop:
            return final
        if step <= start:
            return self.initial  # exact: rounding could turn a density of 1 into another
        left = 1 - (step - start) / (stop - start)
        return final + (self.initial - final) * left**3

    def settles_at(self, total_steps: int) -> int:
        """Return ``stop`` in steps."""
        return resolve_steps(self.stop, total_steps)


@dataclass(frozen=True)
class Stepwise:
    """A density that changes at given points, up or down.

    Attributes:
        points: Pairs (point of training, density from then on), in order.
        initial: Density before the first point, in (0, 1].
        stop: When the method's density begins.
    """

    points: tuple[tuple[Duration, float], ...] = ()
    initial: float = 1.0
    stop: Duration = 0.75

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", tuple((at, density) for at, density in self.points))
        for density in (self.initial, *(density for _, density in self.points)):
            if not 0 < density <= 1:
                raise ConfigurationError(f"density {density} of a step must lie in (0, 1]")
        for at in (self.stop, *(at for at, _ in self.points)):
            check_duration(at, "point")

    def __call__(self, step: int, total_steps: int, final: float) -> float:
        """Return the density after an update at ``step``, in (0, 1]."""
        if step >= self.settles_at(total_steps):
            return final
        density = self.initial
        for at, value in self.points:
            if step >= resolve_steps(at, total_steps):
                density = value
        return density

    def settles_at(self, total_steps: int) -> int:
        """Return ``stop`` in steps."""
        return resolve_steps(self.stop, total_steps)


@dataclass(frozen=True)
class Alternating:
    """Alternating sparse and dense phases: AC/DC (Peste et al. 2021, https://arxiv.org/abs/2106.12379).

    Training is dense until ``start``. Then sparse and dense phases of ``every`` steps alternate, beginning with a sparse
    one. From ``stop`` on training is sparse.

    Attributes:
        every: Length of a phase; not 0.
        start: End of the dense warm-up.
        stop: Latest start of the last sparse phase.
    """

    every: Duration = 0.05
    start: Duration = 0.1
    stop: Duration = 0.75

    def __post_init__(self) -> None:
        for name in ("every", "start", "stop"):
            check_duration(getattr(self, name), name)
        if self.every == 0:
            raise ConfigurationError("every=0: a phase needs at least one step")

    def __call__(self, step: int, total_steps: int, final: float) -> float:
        """Return the density after an update at ``step``, in (0, 1]."""
        start = resolve_steps(self.start, total_steps)
        if step >= self.settles_at(total_steps):
            return final
        if step < start:
            return 1.0
        phase = (step - start) // max(1, resolve_steps(self.every, total_steps))
        return final if phase % 2 == 0 else 1.0

    def settles_at(self, total_steps: int) -> int:
        """Return ``stop`` in steps."""
        return resolve_steps(self.stop, total_steps)
