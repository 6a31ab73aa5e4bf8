"""Perturbations: additions to the gradients of active weights at every step."""

from dst.pieces.perturbations import Langevin

__all__ = ["Langevin"]
