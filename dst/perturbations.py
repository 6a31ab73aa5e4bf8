"""What is added to the gradients of active weights."""

from dst.pieces.perturbations import Langevin

__all__ = ["Langevin"]
