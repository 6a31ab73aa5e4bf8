"""Drop scores and grow scores."""

from dst.pieces.scores import (
    CH3L3,
    Gradient,
    Importance,
    KeptSign,
    Magnitude,
    MagnitudeAndGradient,
    Momentum,
    Random,
    SignedMagnitude,
    Soft,
)

__all__ = [
    "CH3L3",
    "Gradient",
    "Importance",
    "KeptSign",
    "Magnitude",
    "MagnitudeAndGradient",
    "Momentum",
    "Random",
    "SignedMagnitude",
    "Soft",
]
