"""Narrower dense networks."""

from __future__ import annotations

from dataclasses import dataclass

from dst.errors import ConfigurationError

MATCHES = ("parameters", "flops")


@dataclass(frozen=True)
class Narrow:
    """A narrower dense network instead of a sparse one of full width.

    Attributes:
        density: Share of the full-width model, in (0, 1].
        match: Unit of ``density``: ``"parameters"`` or ``"flops"``; see `dst.models.narrow`.
        width_factor: Width factor of the model, in (0, 1]; ``None`` if the model is not built yet. A method does not build models.

    Raises:
        ConfigurationError: A value is out of range.
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
