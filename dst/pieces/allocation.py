"""How a network's budget is split over its layers.

An allocation is a frozen dataclass with ``counts(names, shapes, density, scores)``. Where every layer has a density of its
own (uniform, per layer), it becomes a count as in google-research/rigl: ``zeros = floor(sparsity * N)``, so that a network's
realised density lies at most one weight per layer above its target. Where layers share a budget (ER, ERK, global), the
network's count ``N - floor(sparsity * N)`` is met exactly.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dst.errors import ConfigurationError
from dst.pieces.protocols import Allocation
from dst.topology.counts import count_active, largest_remainders
from dst.topology.seeding import folded_generator
from dst.topology.selection import select_top

Shape = tuple[int, ...]


def network_budget(shapes: Sequence[Shape], density: float) -> int:
    """Active weights of a whole network: ``N - floor((1 - density) * N)``.

    Args:
        shapes: The layers' shapes.
        density: The network's density, in (0, 1].

    Raises:
        ConfigurationError: Fewer weights to keep than layers: some layer would let nothing through.
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
    """Active weights per layer before there are scores, or ``None`` where scores will decide.

    Args:
        allocation: How the budget is split.
        names: The layers' names.
        shapes: The layers' shapes.
        density: The network's density, in (0, 1].

    Raises:
        ConfigurationError: A budget that cannot hold, now rather than when the mask is made.
    """
    if density == 1:
        return [math.prod(s) for s in shapes]
    if allocation.needs_scores:
        network_budget(shapes, density)
        return None
    return allocation.counts(names, shapes, density)


class _LayerDensities:
    """Counts that follow from densities, which follow from names and shapes alone."""

    @property
    def needs_scores(self) -> bool:
        return False

    def densities(self, names: Sequence[str], shapes: Sequence[Shape], density: float) -> list[float]:
        raise NotImplementedError

    def counts(
        self,
        names: Sequence[str],
        shapes: Sequence[Shape],
        density: float,
        scores: Sequence[Tensor] | None = None,
    ) -> list[int]:
        """Active weights per layer.

        Args:
            names: The layers' names.
            shapes: The layers' shapes.
            density: The network's target density, in (0, 1].
            scores: Unused.

        Returns:
            One count per layer, each in [1, N].

        Raises:
            ConfigurationError: Fewer weights to keep than layers.
        """
        network_budget(shapes, density)
        layer_densities = self.densities(names, shapes, density)
        return [count_active(math.prod(s), d) for s, d in zip(shapes, layer_densities, strict=True)]


@dataclass(frozen=True)
class Uniform(_LayerDensities):
    """The same density in every layer.

    Attributes:
        dense_first: Keep the first layer dense, as RigL's "uniform" experiments do (Evci et al. 2020, section 3). The
            others keep the target density, so the network's density is then above the target.
    """

    dense_first: bool = False

    def densities(self, names: Sequence[str], shapes: Sequence[Shape], density: float) -> list[float]:
        """The target density for every layer (1 for the first where ``dense_first``)."""
        return [1.0 if self.dense_first and i == 0 else density for i in range(len(shapes))]


@dataclass(frozen=True)
class ERK(_LayerDensities):
    """Erdős-Rényi-Kernel: a layer's density is proportional to sum(shape) / prod(shape).

    Evci et al. 2020, section 3 (1), https://arxiv.org/abs/1911.11134. Layers that would exceed a density of 1 become
    dense, and the factor is solved again for the others until none does, as in the authors' code; clipping without
    solving again would miss the budget.

    Deviation: the authors round every layer's count up, which can bring the network to two weights per layer above its
    budget. Here counts are rounded so that the budget is met exactly; a layer differs from theirs by a weight at most.

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
        # The authors' budget is a sum of integers too: N - floor(sparsity * N), layer by layer.
        target = sum(count_active(size, density) for size in sizes)
        dense: set[int] = set()
        while len(dense) < len(shapes):
            sparse = [i for i in range(len(shapes)) if i not in dense]
            budget = target - sum(sizes[i] for i in dense)
            epsilon = budget / sum(raw[i] * sizes[i] for i in sparse)
            largest = max(raw[i] for i in sparse)
            if largest * epsilon <= 1.0:
                return [1.0 if i in dense else epsilon * raw[i] for i in range(len(shapes))]
            # As in the authors' code, every layer that ties with the largest becomes dense in the same round.
            dense |= {i for i in sparse if raw[i] == largest}
        return [1.0] * len(shapes)

    def counts(
        self,
        names: Sequence[str],
        shapes: Sequence[Shape],
        density: float,
        scores: Sequence[Tensor] | None = None,
    ) -> list[int]:
        """Active weights per layer, each in [1, N], that add up to the network's budget exactly.

        Raises:
            ConfigurationError: Fewer weights to keep than layers.
        """
        budget = network_budget(shapes, density)
        sizes = [math.prod(s) for s in shapes]
        ideal = [d * n for d, n in zip(self.densities(names, shapes, density), sizes, strict=True)]
        return largest_remainders(ideal, budget, sizes, least=1)


@dataclass(frozen=True)
class ER(ERK):
    """Erdős-Rényi: as ERK, with input and output channels only (Mocanu et al. 2018, https://arxiv.org/abs/1707.04780)."""

    def _raw(self, shape: Shape) -> float:
        channels = shape[:2]
        return (sum(channels) / math.prod(channels)) ** self.power


@dataclass(frozen=True)
class PerLayer(_LayerDensities):
    """Densities given by name.

    Attributes:
        densities_by_name: Layer name or shell-style pattern to density in (0, 1]; the first pattern that matches counts.
            Every layer must be matched, and every pattern must match a layer.
    """

    densities_by_name: Mapping[str, float]

    def __post_init__(self) -> None:
        for pattern, density in self.densities_by_name.items():
            if not 0 < density <= 1:
                raise ConfigurationError(f"density of layer {pattern!r} is {density}; it must lie in (0, 1]")
        object.__setattr__(self, "densities_by_name", dict(self.densities_by_name))

    def densities(self, names: Sequence[str], shapes: Sequence[Shape], density: float) -> list[float]:
        """The given densities, in the layers' order.

        Raises:
            ConfigurationError: A layer without a density, a pattern without a layer, or a realised density further than
                one weight per layer from ``density``.
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
    """One budget for the whole network, spent on the best scores wherever they are.

    The network's count is exact. A layer may end with few connections; one with none would cut the network in two, so
    every layer keeps at least its best one.
    """

    @property
    def needs_scores(self) -> bool:
        """Always: the scores decide."""
        return True

    def counts(
        self,
        names: Sequence[str],
        shapes: Sequence[Shape],
        density: float,
        scores: Sequence[Tensor] | None = None,
    ) -> list[int]:
        """Active weights per layer under one network-wide threshold.

        Args:
            names: The layers' names.
            shapes: The layers' shapes.
            density: The network's density, in (0, 1].
            scores: One float tensor per layer, of its shape.

        Returns:
            Counts that add up to ``N - floor((1 - density) * N)`` over the network.

        Raises:
            ConfigurationError: Fewer weights to keep than layers.
        """
        if scores is None:
            raise ValueError("a global allocation is decided by scores")
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
