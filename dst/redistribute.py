"""Moving budget between layers at topology updates."""

from dst.pieces.redistribute import MeanMomentum, Survivors
from dst.topology.counts import apportion

__all__ = ["MeanMomentum", "Survivors", "apportion"]
