"""Points and spans of training, in optimizer steps or as a fraction of training."""

from __future__ import annotations

from typing import TypeAlias

from dst.errors import ConfigurationError

Duration: TypeAlias = int | float
"""A point or a span of training: an ``int`` counts optimizer steps, a ``float`` in [0, 1] is a fraction of the total
steps. ``1`` is one step, and ``1.0`` is the whole training."""


def resolve_steps(duration: Duration, total_steps: int, name: str = "duration") -> int:
    """Turn a duration into optimizer steps.

    Args:
        duration: Steps (``int``, >= 0) or a fraction of ``total_steps`` (``float`` in [0, 1]).
        total_steps: Optimizer steps of the whole training.
        name: Name of the duration in error messages.

    Returns:
        The number of steps; fractions are rounded to the nearest step.

    Raises:
        ConfigurationError: The duration is negative, or a fraction above 1.
    """
    check_duration(duration, name)
    return duration if isinstance(duration, int) else round(duration * total_steps)


def check_duration(duration: Duration, name: str) -> None:
    """Raise ``ConfigurationError`` unless ``duration`` is an ``int`` >= 0 or a ``float`` in [0, 1]."""
    if isinstance(duration, bool) or not isinstance(duration, (int, float)):
        raise ConfigurationError(f"{name}={duration!r}: give steps (int) or a fraction of training (float)")
    if duration < 0 or (isinstance(duration, float) and not duration <= 1):
        raise ConfigurationError(
            f"{name}={duration!r}: a float is a fraction of the total steps and lies in [0, 1]; "
            "give an int for a number of steps"
        )
