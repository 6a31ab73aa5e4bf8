"""``Method``: a sparse-training method as a composition of small pieces, without state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dst import allocation as allocations
from dst import init as inits
from dst import schedules, scores
from dst.errors import ConfigurationError
from dst.types import Allocation, Clock, Duration, Fraction, Init, Score, as_sampler, check_duration

BACKENDS = ("masked", "csr")


@dataclass(frozen=True)
class LotterySchedule:
    """Iterative pruning with rewinding (Frankle & Carbin 2019; Frankle et al. 2020, https://arxiv.org/abs/1912.05671).

    Attributes:
        prune_fraction: Share of the remaining weights removed after each level, in (0, 1).
        rewind_to: The point of the first, dense level that every later level starts from: weights, optimizer state, step
            and data order.
    """

    prune_fraction: float = 0.2
    rewind_to: Duration = 0

    def __post_init__(self) -> None:
        if not 0 < self.prune_fraction < 1:
            raise ConfigurationError(f"prune_fraction={self.prune_fraction} must lie strictly between 0 and 1")
        check_duration(self.rewind_to, "rewind_to")
        if isinstance(self.rewind_to, float) and self.rewind_to >= 1:
            raise ConfigurationError(f"rewind_to={self.rewind_to} leaves nothing to train; use a fraction below 1")


@dataclass(frozen=True)
class Method:
    """A sparse-training method: what it is, not where it stands.

    ``dst.methods`` holds the published compositions; this class is for new ones.

    Attributes:
        name: Name in tables and checkpoints.
        density: Target density over all sparse layers, in (0, 1].
        allocation: How the budget is split over layers.
        init: Which connections exist in the first mask.
        sparsify_at: When the first mask is made; training is dense before.
        drop: Score of active connections: low ones are dropped. ``None`` with a clock that never fires.
        grow: Score of candidates: high ones are grown. ``None`` with a clock that never fires.
        clock: When the topology is updated.
        fraction: Which share of the active connections an update replaces.
        replace_step: Whether an update takes the place of the optimizer's step, as in RigL's code (all gradients are
            discarded); otherwise the step follows, with gradients masked by the new topology.
        regrow_dropped: Whether a connection dropped just now is a candidate for growth, keeping its value, as in RigL's
            code.
        rescale_init: Scale each output's initial weights by sqrt(fan-in / active fan-in), so that activations keep
            their variance under the first mask (Evci et al. 2022, section 3.1, https://arxiv.org/abs/2010.03533).
        lottery: Levels of iterative pruning with rewinding: several fits, driven by ``dst.lottery``.
        backend: Where weights live: ``"masked"`` keeps ordinary parameters with zeros in place, ``"csr"`` stores and
            computes non-zeros alone, on the CPU (``dst.prepare`` makes its layers).

    Raises:
        ConfigurationError: A value out of range or a combination that cannot work.
    """

    name: str
    density: float
    allocation: Allocation = field(default_factory=allocations.ERK)
    init: Init = field(default_factory=inits.Random)
    sparsify_at: Duration = 0
    drop: Score | None = None
    grow: Score | None = None
    clock: Clock = field(default_factory=schedules.Never)
    fraction: Fraction = field(default_factory=schedules.Cosine)
    replace_step: bool = True
    regrow_dropped: bool = True
    rescale_init: bool = False
    lottery: LotterySchedule | None = None
    backend: str = "masked"

    def __post_init__(self) -> None:
        if isinstance(self.density, bool) or not isinstance(self.density, (int, float)):
            raise ConfigurationError(f"density={self.density!r} is not a number")
        if not 0 < self.density <= 1:
            raise ConfigurationError(f"density={self.density} must lie in (0, 1]: the share of weights that are kept")
        check_duration(self.sparsify_at, "sparsify_at")
        if self.backend not in BACKENDS:
            raise ConfigurationError(f"backend={self.backend!r} is unknown; choose from {', '.join(BACKENDS)}")
        dynamic = not isinstance(self.clock, schedules.Never)
        for role in ("drop", "grow"):
            if dynamic and getattr(self, role) is None:
                raise ConfigurationError(f"{self.name}: a topology that is updated needs a {role} score")
        if self.rescale_init and self.sparsify_at != 0:
            raise ConfigurationError(f"{self.name}: rescale_init needs a mask from step 0, not at {self.sparsify_at}")
        if self.lottery is not None and dynamic:
            raise ConfigurationError(f"{self.name}: lottery levels have fixed masks; use clock=Never()")
        if self.backend == "csr" and self.density < 1 and (reason := self._needs_inactive_weights()):
            raise ConfigurationError(
                f'{self.name}: backend="csr" stores only non-zeros, and {reason}; use backend="masked"'
            )

    def _needs_inactive_weights(self) -> str | None:
        """Why the method cannot do with non-zeros alone, or ``None``."""
        if self.lottery is not None:
            return "its first level is dense"
        if self.init.needs_gradient:
            return f"the first mask, by {type(self.init).__name__}, needs the gradient of every weight"
        if self.sparsify_at != 0:
            return f"training is dense until sparsify_at={self.sparsify_at} (0 makes the mask at once)"
        for score in self.scores().values():
            if score.observes:
                return f"{type(score).__name__} watches the dense gradient at every step"
        if self.drop is not None and not getattr(self.drop, "active_only", False):
            return f"{type(self.drop).__name__} is no drop score of the active weights alone"
        if self.grow is not None and as_sampler(self.grow) is None and type(self.grow) is not scores.Gradient:
            return f"growth is by gradient or at random there, not by {type(self.grow).__name__}"
        return None

    @property
    def is_dynamic(self) -> bool:
        """Whether the topology is ever updated."""
        return not isinstance(self.clock, schedules.Never)

    def scores(self) -> Mapping[str, Score]:
        """The scores by role, those that are set."""
        both: dict[str, Score | None] = {"drop": self.drop, "grow": self.grow}
        return {role: score for role, score in both.items() if score is not None}

    def spec(self) -> dict[str, Any]:
        """The method as nested plain values, for checkpoints and reports."""
        return _plain(self)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}
        return {"_target_": f"{type(value).__module__}.{type(value).__qualname__}", **fields}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()  # numbers from numpy would not load with weights_only=True
    return value


def spec_differences(saved: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Describe how two specs differ, one line per field: ``density: 0.1 in the checkpoint, 0.2 here``."""
    lines: list[str] = []
    for key in dict.fromkeys([*saved, *here]):
        a, b = saved.get(key), here.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping) and a.get("_target_") == b.get("_target_"):
            lines += spec_differences(a, b, f"{prefix}{key}.")
        elif a != b:
            a, b = (
                v["_target_"].rpartition(".")[2] if isinstance(v, Mapping) and "_target_" in v else v for v in (a, b)
            )
            lines.append(f"{prefix}{key}: {a} in the checkpoint, {b} here")
    return lines
