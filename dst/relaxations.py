"""How effective weights follow from latent weights."""

from dst.pieces.relaxations import (
    HardConcrete,
    LatentLayer,
    LearnedThreshold,
    Movement,
    Relaxation,
    StraightThrough,
    pressure,
)

__all__ = ["HardConcrete", "LatentLayer", "LearnedThreshold", "Movement", "Relaxation", "StraightThrough", "pressure"]
