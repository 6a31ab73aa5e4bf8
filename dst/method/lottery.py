"""The schedule of lottery tickets."""

from __future__ import annotations

from dataclasses import dataclass

from dst.errors import ConfigurationError
from dst.pieces.durations import Duration, check_duration

REWINDS = ("weights", "learning_rate", "none")


@dataclass(frozen=True)
class LotterySchedule:
    """Pruning after training, in levels that each train again: lottery tickets and their baselines.

    Frankle & Carbin 2019; Frankle et al. 2020, https://arxiv.org/abs/1912.05671; Renda et al. 2020,
    https://arxiv.org/abs/2003.02389. The first level is dense.

    Attributes:
        prune_fraction: Share of the remaining weights that is pruned after each level, in (0, 1). ``None`` prunes once, from
            the dense level to the density (one-shot).
        rewind_to: Step k of the dense level, below its length. Every later level trains from step k to the end, with the data
            of those steps.
        rewind: What every later level takes from step k of the dense level. ``"weights"``: weights, optimizer state and
            learning rate. ``"learning_rate"``: the learning rate schedule alone; weights and optimizer state are the last
            level's. ``"none"``: nothing; the learning rate is the last of the dense level (fine-tuning).

    Raises:
        ConfigurationError: A value is out of range.
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
