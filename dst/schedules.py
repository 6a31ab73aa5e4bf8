"""When the topology is updated (clocks), and how much of it (fractions)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dst.errors import ConfigurationError
from dst.types import Duration, check_duration, resolve_steps


@dataclass(frozen=True)
class Never:
    """No topology updates."""

    def fires(self, step: int, total_steps: int) -> bool:
        """Always False."""
        return False

    def stop_step(self, total_steps: int) -> int:
        """Step 0."""
        return 0


@dataclass(frozen=True)
class Every:
    """An update every ``every`` steps in [start, stop).

    Steps are optimizer steps, counted from 0. The published defaults update every ΔT = 100 steps and stop after three
    quarters of training (Evci et al. 2020, section 4).

    Deviation: the authors' interval includes its end; here it does not, so that ``stop=1.0`` and ``stop=total`` agree.

    Attributes:
        every: Steps between updates (ΔT), an int >= 1 or a fraction of the total steps.
        start: First step that may update.
        stop: First step that may not.
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
        """Whether ``step`` is start, start + every, … and before stop."""
        start = resolve_steps(self.start, total_steps, "start")
        every = max(1, resolve_steps(self.every, total_steps, "update_every"))
        return start <= step < self.stop_step(total_steps) and (step - start) % every == 0

    def stop_step(self, total_steps: int) -> int:
        """The step at which updates end."""
        return resolve_steps(self.stop, total_steps, "stop")


@dataclass(frozen=True)
class _Decay:
    """A fraction that starts at ``initial``, in [0, 1]."""

    initial: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= 1:
            raise ConfigurationError(f"initial drop fraction {self.initial} must lie in [0, 1]")

    def _progress(self, step: int, stop: int) -> float:
        return min(1.0, step / stop) if stop > 0 else 1.0


@dataclass(frozen=True)
class Constant(_Decay):
    """The same fraction at every update (SET, Mocanu et al. 2018).

    Attributes:
        initial: The fraction, in [0, 1].
    """

    def __call__(self, step: int, stop: int) -> float:
        """``initial``."""
        return self.initial


@dataclass(frozen=True)
class Cosine(_Decay):
    """α/2 · (1 + cos(π · t / T_stop)) (Evci et al. 2020, section 3).

    Attributes:
        initial: α, the fraction at step 0, in [0, 1].
    """

    def __call__(self, step: int, stop: int) -> float:
        """The fraction at ``step`` for updates that end at ``stop``."""
        return self.initial / 2 * (1 + math.cos(math.pi * self._progress(step, stop)))


@dataclass(frozen=True)
class InversePower(_Decay):
    """α · (1 − t / T_stop)^k (Evci et al. 2020, appendix on update schedules).

    Attributes:
        initial: α, the fraction at step 0, in [0, 1].
        power: k > 0; 3 is the authors' choice.
    """

    power: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power <= 0:
            raise ConfigurationError(f"power={self.power} of the inverse-power fraction must be positive")

    def __call__(self, step: int, stop: int) -> float:
        """The fraction at ``step`` for updates that end at ``stop``."""
        return float(self.initial * (1 - self._progress(step, stop)) ** self.power)


@dataclass(frozen=True)
class Linear(_Decay):
    """α · (1 − t / T_stop): inverse power with k = 1.

    Attributes:
        initial: α, the fraction at step 0, in [0, 1].
    """

    def __call__(self, step: int, stop: int) -> float:
        """The fraction at ``step`` for updates that end at ``stop``."""
        return self.initial * (1 - self._progress(step, stop))
