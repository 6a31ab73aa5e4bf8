"""``Method``: a sparse-training method as a composition of small pieces, without state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from dst.method.lottery import LotterySchedule
from dst.method.narrow import Narrow
from dst.method.non_zeros import needs_inactive_weights
from dst.method.spec import plain
from dst.method.validation import check
from dst.pieces import allocation as allocations
from dst.pieces import init as inits
from dst.pieces import patterns, schedules
from dst.pieces.durations import Duration
from dst.pieces.protocols import (
    Allocation,
    Amount,
    Clock,
    DensitySchedule,
    Fraction,
    Init,
    Observer,
    Pattern,
    Perturbation,
    Redistribution,
    Score,
)
from dst.pieces.relaxations import Relaxation


@dataclass(frozen=True)
class Method:
    """A sparse-training method: a frozen composition of pieces, without state.

    ``dst.methods`` has the published methods; use this class for new ones.

    Attributes:
        name: Name in tables and checkpoints.
        density: Target density over all sparse layers, in (0, 1].
        allocation: How the budget is split over layers.
        init: How the first mask is chosen.
        sparsify_at: When the first mask is made; training is dense before.
        drop: Drop score: active weights with the lowest score are dropped. Required unless the clock never fires.
        grow: Grow score: candidates with the highest score are grown. Required unless the clock never fires, or ``schedule``
            only prunes.
        clock: At which steps the topology is updated.
        fraction: Drop fraction: share of a layer's active weights that an update replaces.
        replace_step: Whether an update replaces the optimizer's step, as in RigL's code (all gradients are discarded).
            Otherwise the step follows, with gradients masked by the new topology.
        regrow_dropped: Whether a weight dropped in this update may be grown again and keeps its value, as in RigL's code.
        rescale_init: Whether to multiply the initial weights of each output by sqrt(fan-in / active fan-in), which keeps the
            variance of activations (Evci et al. 2022, section 3.1, https://arxiv.org/abs/2010.03533).
        pattern: Which weights are active together, and within which scope a budget holds; see ``dst.patterns``.
        schedule: Density over time, which ends at ``density``; ``None`` for a constant density.
        first_allocation: How the budget of the first mask is split, if different from ``allocation``; needs ``schedule``.
        redistribute: How budget moves between layers at an update; ``None`` if it does not.
        amount: How many weights an update drops, instead of ``fraction``.
        surplus: Share of the budget by which an update exceeds it, until the next update (MEST's soft memory bound).
        chain_removal: Whether an update also replaces connections that lie on no path from input to output.
        perturb: Addition to the gradients of active weights at every step.
        grown_warmup: Linear warm-up, in steps, of updates to newly grown weights; 0 for none.
        lottery: Levels of pruning and rewinding, in several fits; ``dst.lightning.run_lottery`` runs them.
        narrow: A narrower dense network instead of a sparse one; needs ``density=1``. ``python train.py`` builds it; a
            ``Sparsifier`` trains the model that it gets.
        relaxation: How effective weights follow from latent weights (``dst.relaxations``). The topology is then updated after
            the optimizer's step.
        backend: How weights are stored. ``"masked"``: ordinary parameters with zeros in place. ``"csr"``: non-zeros only, on
            the CPU, in layers that ``dst.prepare`` makes. ``"auto"``: the faster of the two, measured layer by layer.
            ``"latent"``: ordinary parameters, and latent weights beside them; methods with a relaxation have this backend.

    Raises:
        ConfigurationError: A value is out of range, or settings contradict each other.
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
        check(self)
        if self.relaxation is not None:
            object.__setattr__(self, "backend", "latent")

    @property
    def needs_orientation(self) -> str | None:
        """The setting that needs layers with known inputs and outputs, for error messages; ``None`` if none does."""
        if self.pattern.for_density(self.density).is_grouped:
            return f"{self.name}: pattern={type(self.pattern).__name__}"
        if self.rescale_init or self.chain_removal:
            return f"{self.name}: {'rescale_init' if self.rescale_init else 'chain_removal'}"
        return None

    @property
    def target_density(self) -> float:
        """Density relative to the dense network of full width, by sparsity or by a narrower network."""
        return self.density if self.narrow is None else self.narrow.density

    def density_at(self, step: int, total_steps: int) -> float:
        """Return the density after an update at ``step``, in (0, 1]."""
        if self.schedule is None or step >= total_steps - 1:
            return self.density  # no later update could reach it
        return self.schedule(step, total_steps, self.density)

    def pattern_at(self, density: float) -> Pattern:
        """Return the pattern at a density of the network, in (0, 1]; unstructured for a dense network."""
        return self.pattern.for_density(density) if density < 1 else patterns.Unstructured()

    def needs_inactive_weights(self) -> str | None:
        """Return why the method cannot be trained on non-zeros alone (``backend="csr"``), or ``None`` if it can."""
        return needs_inactive_weights(self)

    @cached_property
    def reads_gradient(self) -> bool:
        """Whether a topology update reads the dense gradient."""
        redistributes = self.redistribute is not None and self.redistribute.needs_gradient
        return redistributes or any(score.needs_gradient for score in self.scores().values())

    @property
    def is_dynamic(self) -> bool:
        """Whether the topology is ever updated."""
        return not isinstance(self.clock, schedules.Never)

    @cached_property
    def moves_inactive(self) -> bool:
        """Whether inactive weights are trained too after the first mask, and so need a gradient."""
        return self.relaxation is not None and not self.relaxation.until_mask and self.density < 1

    @property
    def updates_after_step(self) -> bool:
        """Whether the topology is updated after the optimizer's step instead of before it."""
        return self.relaxation is not None

    def scores(self) -> Mapping[str, Score]:
        """Return the scores that are set, by role: ``drop``, ``grow``."""
        return self._scores

    @cached_property
    def _scores(self) -> Mapping[str, Score]:
        both: dict[str, Score | None] = {"drop": self.drop, "grow": self.grow}
        return {role: score for role, score in both.items() if score is not None}

    @cached_property
    def observers(self) -> Mapping[str, Observer]:
        """The scores that observe every step, by role."""
        return {role: cast(Observer, score) for role, score in self.scores().items() if score.observes}

    def spec(self) -> dict[str, Any]:
        """Return the method as nested plain values, for checkpoints and reports."""
        return plain(self)
