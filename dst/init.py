"""Which connections exist in the first mask."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dst import scores
from dst.types import LayerView


@dataclass(frozen=True)
class Random:
    """Uniformly random connections."""

    @property
    def needs_gradient(self) -> bool:
        """Never."""
        return False

    def scores(self, view: LayerView) -> Tensor:
        """Uniform random numbers of the layer's shape."""
        return scores.Random()(view)

    def sample(self, size: int, barred: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Draw the first connections directly, with memory in proportion to their number."""
        return scores.Random().sample(size, barred, count, generator)


@dataclass(frozen=True)
class Magnitude:
    """The largest weights of the moment, as they were initialised, trained or loaded."""

    @property
    def needs_gradient(self) -> bool:
        """Never."""
        return False

    def scores(self, view: LayerView) -> Tensor:
        """abs(weight), of the layer's shape."""
        return view.weight.abs()


@dataclass(frozen=True)
class Snip:
    """Connection sensitivity abs(g · w) (Lee et al. 2019, equation 6, https://arxiv.org/abs/1810.02340).

    The gradient is the first step's, over all its micro-batches; that step changes the mask and not the weights.

    Deviation: the authors divide by the sum over the network, which changes no ranking.
    """

    @property
    def needs_gradient(self) -> bool:
        """Always."""
        return True

    def scores(self, view: LayerView) -> Tensor:
        """abs(gradient · weight), of the layer's shape."""
        assert view.gradient is not None
        return (view.gradient * view.weight).abs()


@dataclass(frozen=True)
class FromFile:
    """The masks of a file written by ``dst.save_masks``; its densities are used, and must agree with the method's.

    Attributes:
        path: The file. Where it lies is no part of the method, so a moved file does not prevent a resume.
    """

    path: str = field(compare=False)

    @property
    def needs_gradient(self) -> bool:
        """Never."""
        return False

    def scores(self, view: LayerView) -> Tensor:
        """Not used: the file holds the masks themselves."""
        raise TypeError("masks read from a file are not scored")
