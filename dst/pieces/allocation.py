"""Allocations: how a network's budget is split over its layers.

An allocation is a frozen dataclass with ``counts(names, shapes, density, scores)``. If each layer has a density of its own
(uniform, per layer), its count follows google-research/rigl: ``zeros = floor(sparsity * N)``. The network's density is then
at most one weight per layer above its target. If layers share a budget (ER, ERK, global), the network's count is exactly
``N - floor(sparsity * N)``.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.pieces.protocols import Allocation
from dst.topology.counts import count_active, largest_remainders
from dst.topology.seeding import folded_generator
from dst.topology.selection import select_top

Shape = tuple[int, ...]


def network_budget(shapes: Sequence[Shape], density: float) -> int:
    """Return the number of active weights of a network: ``N - floor((1 - density) * N)``.

    Args:
        shapes: The layers' shapes.
        density: The network's density, in (0, 1].

    Raises:
        ConfigurationError: The budget is smaller than the number of layers.
    """
    total = sum(math.prod(s) for s in shapes)
    budget = count_active(total, density)
    if budget < len(shapes):
        raise ConfigurationError(
            f"density={density:g} keeps {budget} weights for {len(shapes)} layers; "
            f"use at least {len(shapes) / total:.2g}"
        )
    return budget


def planned_counts(
    allocation: Allocation, names: Sequence[str], shapes: Sequence[Shape], density: float
) -> list[int] | None:
    """Return the number of active weights per layer, or ``None`` if the allocation needs scores.

    Args:
        allocation: How the budget is split.
        names: The layers' names.
        shapes: The layers' shapes.
        density: The network's density, in (0, 1].

    Raises:
        ConfigurationError: The budget is impossible.
    """
    if density == 1:
        return [math.prod(s) for s in shapes]
    if allocation.needs_scores:
        network_budget(shapes, density)
        return None
    return allocation.counts(names, shapes, density)


class _LayerDensities:
    """Allocations by a density for each layer, which depends on names and shapes alone."""

    needs_scores: ClassVar[bool] = False

    def densities(self, names: Sequence[str], shapes: Sequence[Shape], density: float) -> list[float]:
        raise NotImplementedError

    def counts(
        self,
        names: Sequence[str],
        shapes: Sequence[Shape],
        density: float,
        scores: Sequence[Tensor] | None = None,
    ) -> list[int]:
        """Return the number of active weights per layer.

        Args:
            names: The layers' names.
            shapes: The layers' shapes.
            density: The network's target density, in (0, 1].
            scores: Unused.

        Returns:
            One count per layer, each in [1, N]. For ER and ERK the sum is exactly the network's budget.

        Raises:
            ConfigurationError: The budget is smaller than the number of layers.
        """
        budget = network_budget(shapes, density)
        return self._rounded(self.densities(names, shapes, density), [math.prod(s) for s in shapes], budget)

    def _rounded(self, densities: Sequence[float], sizes: Sequence[int], budget: int) -> list[int]:
        """Counts of layers with these densities and sizes; each layer is rounded separately."""
        return [count_active(size, d) for size, d in zip(sizes, densities, strict=True)]


@dataclass(frozen=True)
class Uniform(_LayerDensities):
    """The same density in every layer.

    Attributes:
        dense_first: Whether the first layer stays dense, as in RigL's "uniform" experiments (Evci et al. 2020, section 3).
            The other layers have the target density, so the network's density is above it.
    """

    dense_first: bool = False

    def densities(self, names: Sequence[str], shapes: Sequence[Shape], density: float) -> list[float]:
        """The target density for every layer; 1 for the first if ``dense_first``."""
        return [1.0 if self.dense_first and i == 0 else density for i in range(len(shapes))]


@dataclass(frozen=True)
class ERK(_LayerDensities):
    """Erdős-Rényi-Kernel: a layer's density is proportional to sum(shape) / prod(shape).

    Evci et al. 2020, section 3 (1), https://arxiv.org/abs/1911.11134. As in the authors' code, layers that would exceed a
    density of 1 become dense, and the factor is solved again for the others, until no layer exceeds 1. Clipping alone would
    miss the budget.

    Deviation: the authors round the count of every layer up, which can exceed the budget by two weights per layer. Here
    counts are rounded to meet the budget exactly; a layer differs from theirs by at most one weight.

    Attributes:
        power: Exponent on the raw density (``erk_power_scale`` in the authors' code).
    """

    power: float = 1.0

    def _raw(self, shape: Shape) -> float:
        return (sum(shape) / math.prod(shape)) ** self.power

    def densities(self, names: Sequence[str], shapes: Sequence[Shape], density: float) -> list[float]:
        """Layer densities, each in (0, 1], whose weighted mean is ``density``."""
        sizes = [math.prod(s) for s in shapes]
        raw = [self._raw(s) for s in shapes]
        # The authors' budget is the sum of N - floor(sparsity * N) over layers, too.
        target = sum(count_active(size, density) for size in sizes)
        dense: set[int] = set()
        while len(dense) < len(shapes):
            sparse = [i for i in range(len(shapes)) if i not in dense]
            budget = target - sum(sizes[i] for i in dense)
            epsilon = budget / sum(raw[i] * sizes[i] for i in sparse)
            largest = max(raw[i] for i in sparse)
            if largest * epsilon <= 1.0:
                return [1.0 if i in dense else epsilon * raw[i] for i in range(len(shapes))]
            # As in the authors' code, all layers that tie with the largest become dense in the same round.
            dense |= {i for i in sparse if raw[i] == largest}
        return [1.0] * len(shapes)

    def _rounded(self, densities: Sequence[float], sizes: Sequence[int], budget: int) -> list[int]:
        """Counts of layers, which add up to the budget exactly."""
        return largest_remainders([d * n for d, n in zip(densities, sizes, strict=True)], budget, sizes, least=1)


@dataclass(frozen=True)
class ER(ERK):
    """Erdős-Rényi: ERK with input and output channels only (Mocanu et al. 2018, https://arxiv.org/abs/1707.04780)."""

    def _raw(self, shape: Shape) -> float:
        channels = shape[:2]
        return (sum(channels) / math.prod(channels)) ** self.power


@dataclass(frozen=True)
class PerLayer(_LayerDensities):
    """Densities given by name.

    Attributes:
        densities_by_name: Name of a layer or shell-style pattern to density in (0, 1]; the first match counts. Every layer
            needs a match, and every pattern a layer.
    """

    densities_by_name: Mapping[str, float]

    def __post_init__(self) -> None:
        for pattern, density in self.densities_by_name.items():
            if not 0 < density <= 1:
                raise ConfigurationError(f"density of layer {pattern!r} is {density}; it must lie in (0, 1]")
        object.__setattr__(self, "densities_by_name", dict(self.densities_by_name))

    def densities(self, names: Sequence[str], shapes: Sequence[Shape], density: float) -> list[float]:
        """The given densities, in the order of the layers.

        Raises:
            ConfigurationError: A layer has no density, a pattern matches no layer, or the realised density differs from
                ``density`` by more than one weight per layer.
        """
        table = self.densities_by_name
        chosen = [next((p for p in table if p == n or fnmatch.fnmatchcase(n, p)), None) for n in names]
        if missing := [n for n, p in zip(names, chosen, strict=True) if p is None]:
            raise ConfigurationError(
                f"no density is given for {', '.join(missing)}; add them, or a pattern such as '*'"
            )
        if unused := [p for p in table if p not in chosen]:
            raise ConfigurationError(f"densities for {unused} match no layer; the layers are {', '.join(names)}")
        result = [table[p] for p in chosen if p is not None]
        realised = sum(count_active(math.prod(s), d) for s, d in zip(shapes, result, strict=True))
        total = sum(math.prod(s) for s in shapes)
        if abs(realised - density * total) > len(shapes):
            raise ConfigurationError(
                f"the layers' densities add up to {realised / total:.6g}, but density={density:.6g} was asked for; "
                f"pass density={realised / total:.6g} or change the layers'"
            )
        return result


@dataclass(frozen=True)
class Global:
    """One budget for the whole network: the best scores of all layers.

    The network's count is exact. Every layer keeps at least its best weight, because a layer without any would cut the
    network in two.
    """

    needs_scores: ClassVar[bool] = True

    def counts(
        self,
        names: Sequence[str],
        shapes: Sequence[Shape],
        density: float,
        scores: Sequence[Tensor] | None = None,
    ) -> list[int]:
        """Return the number of active weights per layer under one threshold for the network.

        Args:
            names: The layers' names.
            shapes: The layers' shapes.
            density: The network's density, in (0, 1].
            scores: One float tensor per layer, of its shape.

        Returns:
            One count per layer, each at least 1; the sum is ``N - floor((1 - density) * N)``.

        Raises:
            ConfigurationError: The budget is smaller than the number of layers.
        """
        if scores is None:
            raise ValueError("a global allocation needs scores")
        sizes = [math.prod(s) for s in shapes]
        budget = network_budget(shapes, density)
        flat = torch.cat([s.detach().reshape(-1).float().cpu() for s in scores])
        everything = torch.ones_like(flat, dtype=torch.bool)
        chosen = select_top(flat, budget, everything, folded_generator("global", len(flat)))
        counts = [int(part.sum()) for part in chosen.split(sizes)]
        for i, count in enumerate(counts):
            if count == 0:
                counts[i] = 1
                counts[counts.index(max(counts))] -= 1
        return counts
