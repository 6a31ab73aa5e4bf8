"""``Method``: a sparse-training method as a composition of small pieces, without state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dst.errors import ConfigurationError, StateError
from dst.pieces import allocation as allocations
from dst.pieces import init as inits
from dst.pieces import patterns, schedules, scores
from dst.pieces.durations import Duration, check_duration
from dst.pieces.protocols import (
    ActiveScore,
    Allocation,
    Amount,
    Clock,
    DensitySchedule,
    Fraction,
    Init,
    Pattern,
    Perturbation,
    Redistribution,
    Score,
    as_sampler,
    waits_for_batch,
)
from dst.pieces.relaxations import Relaxation, StraightThrough

BACKENDS = ("masked", "csr", "auto", "latent")

REWINDS = ("weights", "learning_rate", "none")

MATCHES = ("parameters", "flops")


@dataclass(frozen=True)
class LotterySchedule:
    """Pruning after training, and training again: lottery tickets and what they are compared with.

    Frankle & Carbin 2019; Frankle et al. 2020, https://arxiv.org/abs/1912.05671; Renda et al. 2020,
    https://arxiv.org/abs/2003.02389.

    Attributes:
        prune_fraction: Share of the remaining weights removed after each level, in (0, 1); ``None`` prunes once, from the
            dense level straight to the density (one-shot).
        rewind_to: Step k of the first, dense level: every later level takes the steps from k to the end, with the data of
            those steps.
        rewind: What goes back to step k with them. ``"weights"``: all (weights, optimizer state, learning rate);
            ``"learning_rate"``: its schedule alone, weights and per-weight optimizer state are those that the level before
            ended with; ``"none"``: nothing, and the learning rate is the dense level's last (fine-tuning).
    """

    prune_fraction: float | None = 0.2
    rewind_to: Duration = 0
    rewind: str = "weights"

    def __post_init__(self) -> None:
        if self.rewind not in REWINDS:
            raise ConfigurationError(f"rewind={self.rewind!r} is unknown; choose from {', '.join(REWINDS)}")
        if self.prune_fraction is not None and not 0 < self.prune_fraction < 1:
            raise ConfigurationError(f"prune_fraction={self.prune_fraction} must lie strictly between 0 and 1")
        check_duration(self.rewind_to, "rewind_to")
        if isinstance(self.rewind_to, float) and self.rewind_to >= 1:
            raise ConfigurationError(f"rewind_to={self.rewind_to} leaves nothing to train; use a fraction below 1")


@dataclass(frozen=True)
class Narrow:
    """A narrower dense network in the place of a sparse one of full size.

    Attributes:
        density: Which share of the full-size model it has, in (0, 1].
        match: Share of what: ``"parameters"`` or ``"flops"``; see `dst.models.narrow`.
        width_factor: What the model was built with, and ``None`` where nobody has made it narrower: a method does not build
            models.
    """

    density: float
    match: str = "parameters"
    width_factor: float | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.density, (int, float)) and not isinstance(self.density, bool)
        if not number or not 0 < self.density <= 1:
            raise ConfigurationError(f"density={self.density!r} must lie in (0, 1]: the share of the full-size model")
        if self.match not in MATCHES:
            raise ConfigurationError(f"match={self.match!r} is unknown; choose from {', '.join(MATCHES)}")


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
        pattern: Which weights are active together, and within which window a budget holds; see ``dst.patterns``.
        schedule: The budget over time; ``None`` for the same density throughout. ``density`` is what it ends at.
        first_allocation: How the first mask's budget is split, where otherwise than later ones; needs ``schedule``.
        redistribute: Moves budget between layers at updates; ``None`` for none.
        amount: How many connections an update drops, instead of ``fraction``.
        surplus: Share of the budget by which an update grows more than it, until the next update drops down to it (MEST's
            soft memory bound); ``None`` for none.
        chain_removal: Whether an update also replaces connections that lie on no path; see ``dst.chains``.
        perturb: Added to the gradients of active weights at every step; ``None`` for nothing.
        grown_warmup: Linear warm-up, in steps, of updates to newly grown weights; 0 for none.
        lottery: Levels of iterative pruning with rewinding: several fits, driven by ``dst.lottery``.
        narrow: The model is to be a narrower one, and dense (``density`` 1). ``python train.py`` builds it; a ``Sparsifier``
            trains the model that it is given.
        relaxation: What the network sees of latent weights, where inactive weights live on (``dst.relaxations``). The
            topology is then updated behind the optimizer's step, from the weights that the next forward pass sees.
        backend: How weights are stored: ``"masked"`` keeps ordinary parameters with zeros in place, ``"csr"`` stores and
            computes non-zeros alone, on the CPU (``dst.prepare`` makes its layers), ``"auto"`` measures which of the two is
            faster, layer by layer. Methods with a relaxation have
            ``"latent"``: ordinary parameters with zeros in place, and the latent weights beside them.

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
    pattern: Pattern = field(default_factory=patterns.Unstructured)
    schedule: DensitySchedule | None = None
    first_allocation: Allocation | None = None
    redistribute: Redistribution | None = None
    amount: Amount | None = None
    surplus: Fraction | None = None
    chain_removal: bool = False
    perturb: Perturbation | None = None
    grown_warmup: int = 0
    lottery: LotterySchedule | None = None
    narrow: Narrow | None = None
    relaxation: Relaxation | None = None
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
        if dynamic and self.drop is None:
            raise ConfigurationError(f"{self.name}: a topology that is updated needs a drop score")
        if dynamic and self.grow is None and self.schedule is None:
            raise ConfigurationError(
                f"{self.name}: a topology that is updated needs a grow score, or a density schedule that only prunes"
            )
        self._check_moving_budget(dynamic)
        if self.rescale_init and self.sparsify_at != 0:
            raise ConfigurationError(f"{self.name}: rescale_init needs a mask from step 0, not at {self.sparsify_at}")
        if self.lottery is not None and dynamic:
            raise ConfigurationError(f"{self.name}: lottery levels have fixed masks; use clock=Never()")
        if self.narrow is not None and (self.density != 1 or dynamic or self.lottery or self.relaxation is not None):
            raise ConfigurationError(
                f"{self.name}: narrow is for dense networks: use density=1, whose share is narrow's, and neither clock, lottery "
                "nor relaxation"
            )
        if self.relaxation is not None:
            self._check_relaxation(self.relaxation, dynamic)
            object.__setattr__(self, "backend", "latent")
        elif any(isinstance(x, (inits.Importance, scores.Importance)) for x in (self.init, self.drop, self.grow)):
            raise ConfigurationError(f"{self.name}: Importance is that of latent weights, which need a relaxation")
        elif self.backend == "latent":
            raise ConfigurationError(
                f'{self.name}: backend="latent" needs a relaxation, which says what the network sees of latent weights'
            )
        if self.backend == "csr" and self.density < 1 and (reason := self.needs_inactive_weights()):
            raise ConfigurationError(
                f'{self.name}: backend="csr" stores only non-zeros, and {reason}; use backend="masked"'
            )

    def _check_moving_budget(self, dynamic: bool) -> None:
        """Refuse pieces that do nothing, or contradict each other."""
        moving: dict[str, object] = {
            "schedule": self.schedule,
            "redistribute": self.redistribute,
            "amount": self.amount,
            "surplus": self.surplus,
            "chain_removal": self.chain_removal or None,
        }
        for name, piece in moving.items():
            if piece is not None and not dynamic:
                raise ConfigurationError(f"{self.name}: {name} acts at topology updates, and the clock never fires")
            if piece is not None and name != "schedule" and self.grow is None:
                raise ConfigurationError(f"{self.name}: {name} needs a grow score")
        if self.surplus is not None and (self.redistribute is not None or self.amount is not None):
            raise ConfigurationError(f"{self.name}: surplus does not combine with redistribute or amount")
        self._check_pattern()
        if self.first_allocation is not None and self.schedule is None:
            raise ConfigurationError(f"{self.name}: first_allocation differs from allocation only with a schedule")
        if isinstance(self.grown_warmup, bool) or not isinstance(self.grown_warmup, int):
            raise ConfigurationError(f"{self.name}: grown_warmup={self.grown_warmup!r} must be a whole number of steps")
        if self.grown_warmup < 0:
            raise ConfigurationError(f"{self.name}: grown_warmup={self.grown_warmup} must not be negative")

    def _check_pattern(self) -> None:
        """Refuse what works on single weights, or moves a density that the pattern fixes."""
        resolved = self.pattern.for_density(self.density)  # refuses a density that the pattern cannot have
        if not resolved.is_grouped:
            return
        pattern = type(self.pattern).__name__
        if self.chain_removal:
            raise ConfigurationError(f"{self.name}: chain_removal drops single connections, which {pattern} cannot")
        if self.lottery is not None:
            raise ConfigurationError(
                f"{self.name}: lottery levels prune single weights, which {pattern} cannot; use pattern=Unstructured()"
            )
        if not resolved.is_free:
            for name in ("redistribute", "surplus"):
                if getattr(self, name) is not None:
                    raise ConfigurationError(
                        f"{self.name}: {pattern} fixes every layer's density, and {name} changes it"
                    )
            if self.schedule is not None and not isinstance(self.schedule, schedules.Alternating):
                raise ConfigurationError(
                    f"{self.name}: {pattern} has one density, and {type(self.schedule).__name__} runs through others"
                )

    @property
    def needs_orientation(self) -> str | None:
        """The setting for which layers must have known inputs and outputs, or ``None``."""
        if self.pattern.for_density(self.density).is_grouped:
            return f"{self.name}: pattern={type(self.pattern).__name__}"
        if self.rescale_init or self.chain_removal:
            return f"{self.name}: {'rescale_init' if self.rescale_init else 'chain_removal'}"
        return None

    @property
    def target_density(self) -> float:
        """Share of a full-size dense network that is asked for, by sparsity or by a narrower network."""
        return self.density if self.narrow is None else self.narrow.density

    def density_at(self, step: int, total_steps: int) -> float:
        """The budget that an update at ``step`` keeps to, in (0, 1]."""
        if self.schedule is None or step >= total_steps - 1:
            return self.density  # the last step is the last chance to arrive there
        return self.schedule(step, total_steps, self.density)

    def pattern_at(self, density: float) -> Pattern:
        """The pattern at a density of the network, in (0, 1]: a dense one has none."""
        return self.pattern.for_density(density) if density < 1 else patterns.Unstructured()

    def _check_relaxation(self, relaxation: Relaxation, dynamic: bool) -> None:
        kind = type(relaxation).__name__
        if self.backend == "csr":
            raise ConfigurationError(
                f'{self.name}: backend="csr" stores only non-zeros, and {kind} keeps inactive weights; use '
                'backend="masked" (latent weights beside ordinary parameters)'
            )
        if self.lottery is not None or self.rescale_init:
            other = "lottery levels" if self.lottery is not None else "rescale_init"
            raise ConfigurationError(f"{self.name}: {other} and {kind} do not go together: its weights live on")
        if relaxation.until_mask and (dynamic or self.sparsify_at == 0):
            raise ConfigurationError(
                f"{self.name}: {kind} learns what is active until sparsify_at, which must be above 0, and leaves a fixed "
                "mask; use clock=Never()"
            )
        if dynamic and self.replace_step:
            raise ConfigurationError(
                f"{self.name}: {kind} updates the topology behind the step and cannot replace it; use replace_step=False"
            )
        if isinstance(relaxation, StraightThrough) and (relaxation.backward_density or 1) < self.density:
            raise ConfigurationError(
                f"{self.name}: backward_density={relaxation.backward_density} must be at least density={self.density:g}: "
                "active weights are always moved"
            )

    def needs_inactive_weights(self) -> str | None:
        """Why the method cannot do with non-zeros alone, or ``None``."""
        if self.lottery is not None:
            return "its first level is dense"
        if self.init.needs_gradient:
            return f"the first mask, by {type(self.init).__name__}, needs the gradient of every weight"
        if waits_for_batch(self.init):
            return f"the first mask, by {type(self.init).__name__}, is decided on all weights in the first step"
        if self.sparsify_at != 0:
            return f"training is dense until sparsify_at={self.sparsify_at} (0 makes the mask at once)"
        if self.schedule is not None or self.redistribute is not None or self.surplus is not None:
            return "it changes the number of a layer's connections"
        if self.amount is not None or self.chain_removal or self.perturb is not None or self.grown_warmup:
            return "it looks at single weights in ways that are built for masks"
        if self.pattern.is_grouped:
            return f"{type(self.pattern).__name__} connections are chosen there by masks"
        for score in self.scores().values():
            if score.observes:
                return f"{type(score).__name__} watches every weight at every step"
        if self.drop is not None and not (isinstance(self.drop, ActiveScore) and self.drop.active_only):
            return f"{type(self.drop).__name__} is no drop score of the active weights alone"
        if self.grow is not None and as_sampler(self.grow) is None and type(self.grow) is not scores.Gradient:
            return f"growth is by gradient or at random there, not by {type(self.grow).__name__}"
        return None

    @property
    def reads_gradient(self) -> bool:
        """Whether a topology update reads the dense gradient."""
        redistributes = self.redistribute is not None and self.redistribute.needs_gradient
        return redistributes or any(score.needs_gradient for score in self.scores().values())

    @property
    def is_dynamic(self) -> bool:
        """Whether the topology is ever updated."""
        return not isinstance(self.clock, schedules.Never)

    @property
    def moves_inactive(self) -> bool:
        """Whether inactive weights are trained too once there is a mask, by a gradient beyond the active weights'."""
        return self.relaxation is not None and not self.relaxation.until_mask and self.density < 1

    @property
    def updates_after_step(self) -> bool:
        """Whether the topology is updated behind the optimizer's step rather than before it."""
        return self.relaxation is not None

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
        return {"_target_": _public_path(type(value)), **fields}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()  # numbers from numpy would not load with weights_only=True
    return value


def _public_path(kind: type) -> str:
    """Where users find a class: pieces go by their public module, wherever they are defined below ``dst.pieces``."""
    package, _, rest = kind.__module__.partition(".pieces.")
    module = f"dst.{rest.partition('.')[0]}" if package == "dst" and rest else kind.__module__
    return f"{module}.{kind.__qualname__}"


def check_same(saved: Mapping[str, Any], method: Method) -> None:
    """Raise StateError where a checkpoint's ``Method.spec()`` is not this method's; the backend may differ."""
    if differences := spec_differences({**saved, "backend": method.backend}, method.spec()):
        raise StateError(f"the checkpoint is of another method ({'; '.join(differences)})")


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


def check_method(method: Any) -> None:
    """Raise ``ConfigurationError`` for what is no method."""
    if isinstance(method, Method):
        return
    name = getattr(method, "__name__", None)
    if callable(method) and str(getattr(method, "__module__", "")).startswith("dst.methods"):
        raise ConfigurationError(f"dst.methods.{name} is a function that makes a method: call it, {name}(density=0.1)")
    raise ConfigurationError(f"{shown(method)} is not a method: pass one such as dst.methods.rigl(density=0.1)")


def shown(thing: Any) -> str:
    """A thing in an error message: its value, cut short, and its type."""
    return "None" if thing is None else f"{thing!r:.60} ({type(thing).__name__})"
