"""Moving budget between layers at topology updates."""

from dst.pieces.redistribute import MeanMomentum, Survivors, apportion

__all__ = ["MeanMomentum", "Survivors", "apportion"]
