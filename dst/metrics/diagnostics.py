r"""Diagnostics of masks as torchmetrics classes: they accumulate over updates and processes.

All processes hold the same masks, so summing over processes leaves every ratio as it is. Diagnostics of gradients and losses
are in ``dst.metrics.training_diagnostics``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from dst.errors import ConfigurationError
from dst.metrics import health, topology
from dst.metrics.topology import Masks


class _Share(Metric):
    """A numerator over a denominator, both summed over updates and processes."""

    full_state_update = False
    is_differentiable = False
    empty = 0.0

    part: Tensor
    whole: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("part", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("whole", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _count(self, counts: tuple[int, int]) -> None:
        self.part += counts[0]
        self.whole += counts[1]

    def compute(self) -> Tensor:
        """Return the share over all updates: a scalar in [0, 1]."""
        return topology.ratio(int(self.part), int(self.whole), self.empty)


class MaskDensity(_Share):
    r"""Share of active weights over all updates; see `dst.metrics.mask_density`.

    .. math:: d = \frac{\sum_l |M_l|}{\sum_l N_l}

    Example:
        >>> import torch
        >>> from dst.metrics import MaskDensity
        >>> metric = MaskDensity()
        >>> metric.update({"a": torch.tensor([True, False]), "b": torch.tensor([True, False, False, False])})
        >>> metric.compute()
        tensor(0.3333)
    """

    higher_is_better = False

    def update(self, masks: Masks) -> None:
        """Add masks: bool tensors of any shape."""
        self._count(topology.density_counts(masks))


class MaskChurn(_Share):
    r"""Share of the active weights that topology updates have grown; see `dst.metrics.mask_churn`.

    .. math:: c = \frac{\sum_l |M'_l \setminus M_l|}{\sum_l |M'_l|}

    Example:
        >>> import torch
        >>> from dst.metrics import MaskChurn
        >>> metric = MaskChurn()
        >>> metric.update(torch.tensor([True, True, False]), torch.tensor([True, False, True]))
        >>> metric.compute()
        tensor(0.5000)
    """

    def update(self, before: Masks, after: Masks) -> None:
        """Add masks of the same layers before and after an update."""
        self._count(topology.churn_counts(before, after))


class MaskOverlap(_Share):
    r"""Overlap of the topologies of two runs over all updates; see `dst.metrics.mask_overlap`.

    .. math:: J = \frac{\sum_l |A_l \cap B_l|}{\sum_l |A_l \cup B_l|}
        \qquad O = \frac{\sum_l |A_l \cap B_l|}{\sum_l |A_l|}

    Args:
        over: "union" (Jaccard) or "active".
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        ConfigurationError: If ``over`` is unknown.

    Example:
        >>> import torch
        >>> from dst.metrics import MaskOverlap
        >>> metric = MaskOverlap(over="active")
        >>> metric.update(torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False]))
        >>> metric.compute()
        tensor(0.5000)
    """

    empty = 1.0

    def __init__(self, over: str = "union", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if over not in ("union", "active"):
            raise ConfigurationError(f"over={over!r} must be 'union' (Jaccard) or 'active'")
        self.over = over

    def update(self, first: Masks, second: Masks) -> None:
        """Add masks of the same layers of two runs."""
        self._count(topology.overlap_counts(first, second, self.over))


class NMConformance(_Share):
    r"""Share of the windows of M consecutive inputs with at most N active weights; see `dst.metrics.nm_conformance`.

    .. math:: C = \frac{1}{W} \sum_w [\, |M_w| \le N \,]

    Args:
        n: Largest number N of active weights in a window, 1 to ``m``.
        m: Length M of a window.
        dim: Dimension of the windows.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from dst.metrics import NMConformance
        >>> metric = NMConformance(2, 4)
        >>> metric.update(torch.tensor([[True, False, True, False, True, True, True, False]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = True
    empty = 1.0

    def __init__(self, n: int, m: int, dim: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n, self.m, self.dim = n, m, dim

    def update(self, masks: Masks) -> None:
        """Add masks: bool tensors of shape (out, in, ...)."""
        self._count(topology.nm_counts(masks, self.n, self.m, self.dim))


class DeadUnits(_Share):
    r"""Share of the outputs, or of the inputs, without an active weight, over all layers and updates.

    .. math:: \frac{\sum_l |\mathrm{dead}_l|}{\sum_l n_l}

    See `dst.metrics.dead_outputs` and `dst.metrics.dead_inputs` for one layer.

    Args:
        side: "outputs" or "inputs".
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        ConfigurationError: If ``side`` is unknown.

    Example:
        >>> import torch
        >>> from dst.metrics import DeadUnits
        >>> metric = DeadUnits("outputs")
        >>> metric.update({"a": torch.tensor([[True, False], [False, False]])})
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = False

    def __init__(self, side: str = "outputs", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if side not in ("outputs", "inputs"):
            raise ConfigurationError(f"side={side!r} must be 'outputs' or 'inputs'")
        self.side = side

    def update(self, masks: Masks, output_dims: Sequence[int] | None = None) -> None:
        """Add masks of shape (out, in, ...), and for each the dimension of its outputs; default 0."""
        find = health.dead_outputs if self.side == "outputs" else health.dead_inputs
        tensors = topology.as_masks(masks)
        for mask, dim in zip(tensors, output_dims or [0] * len(tensors), strict=True):
            dead = find(mask, dim)
            self._count((int(dead.sum()), dead.numel()))


class EffectiveDensity(_Share):
    r"""Share of the weights of a chain that lie on a path from input to output; see `dst.metrics.effective_density`.

    .. math:: d_\mathrm{eff} = \frac{\sum_l |E_l|}{\sum_l N_l} \le d

    Example:
        >>> import torch
        >>> from dst.metrics import EffectiveDensity
        >>> metric = EffectiveDensity()
        >>> metric.update([torch.tensor([[True, False], [False, True]]), torch.tensor([[True, False]])])
        >>> metric.compute()
        tensor(0.3333)
    """

    def update(self, masks: Sequence[Tensor]) -> None:
        """Add masks of a chain of layers, from input to output."""
        self._count(health.chain_effective_counts(masks))


class CollapsedLayers(Metric):
    r"""Largest number of layers without an active weight at once; see `dst.metrics.collapsed_layers`.

    .. math:: \max_t |\{ l : |M_l^t| = 0 \}|

    Example:
        >>> import torch
        >>> from dst.metrics import CollapsedLayers
        >>> metric = CollapsedLayers()
        >>> metric.update({"a": torch.tensor([True, False]), "b": torch.tensor([False, False])})
        >>> metric.compute()
        tensor(1)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    collapsed: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("collapsed", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")

    def update(self, masks: Mapping[str, Tensor]) -> None:
        """Add masks by name."""
        self.collapsed = self.collapsed.clamp(min=len(health.collapsed_layers(masks)))

    def compute(self) -> Tensor:
        """Return a count, int64."""
        return self.collapsed


class ExplorationRate(Metric):
    r"""ITOP rate: share of the weights of sparse layers that were ever active; see `dst.metrics.exploration_rate`.

    .. math:: R = \frac{\sum_l |\bigcup_t M_l^t|}{\sum_l N_l}

    Layers that are dense in the last masks count in neither term. ``Sparsifier.exploration_rate`` counts from the first mask
    of a run; this class counts from its first update.

    Args:
        shapes: Name -> shape of the mask.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from dst.metrics import ExplorationRate
        >>> metric = ExplorationRate({"w": (4,)})
        >>> metric.update({"w": torch.tensor([True, False, False, False])})
        >>> metric.update({"w": torch.tensor([False, True, False, False])})
        >>> metric.compute()
        tensor(0.5000)
    """

    full_state_update = True
    is_differentiable = False

    def __init__(self, shapes: Mapping[str, Sequence[int]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        for i, shape in enumerate(self.shapes.values()):
            # Names of states must be identifiers; uint8, because maxima of bools are not defined.
            self.add_state(f"union_{i}", torch.zeros(shape, dtype=torch.uint8), dist_reduce_fx="max")
            self.add_state(f"last_{i}", torch.zeros(shape, dtype=torch.uint8), dist_reduce_fx="max")

    def update(self, masks: Mapping[str, Tensor]) -> None:
        """Add the masks of a step, of the shapes given to the constructor."""
        topology.as_masks(masks)
        if {name: tuple(mask.shape) for name, mask in masks.items()} != self.shapes:
            raise ConfigurationError(f"the masks are not of the shapes {self.shapes} that this metric was made for")
        for i, name in enumerate(self.shapes):
            mask = masks[name].to(device=self.device, dtype=torch.uint8)
            setattr(self, f"union_{i}", getattr(self, f"union_{i}") | mask)
            setattr(self, f"last_{i}", mask.clone())

    def compute(self) -> Tensor:
        """Return a scalar in [0, 1]; 1 if all layers are dense."""
        union, last = (
            [getattr(self, f"{kind}_{i}").bool() for i in range(len(self.shapes))] for kind in ("union", "last")
        )
        return topology.ratio(*topology.explored_counts(union, last), empty=1.0)


class InDegreeHistogram(Metric):
    r"""Distribution of the fan-in of output units; see `dst.metrics.in_degree_histogram`.

    .. math:: h_k = \frac{|\{o : k_o = k\}|}{n}

    Args:
        largest: Largest fan-in with an entry of its own, at least 1. Units with more count in the last entry.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from dst.metrics import InDegreeHistogram
        >>> metric = InDegreeHistogram(largest=3)
        >>> metric.update(torch.tensor([[True, True, False], [False, False, False]]))
        >>> metric.compute()
        tensor([0.5000, 0.0000, 0.5000, 0.0000])
    """

    full_state_update = False
    is_differentiable = False

    units: Tensor

    def __init__(self, largest: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if largest < 1:
            raise ConfigurationError(f"largest={largest} must be at least 1")
        self.add_state("units", torch.zeros(largest + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, mask: Tensor, output_dim: int = 0) -> None:
        """Add a mask of shape (out, in, ...)."""
        degrees = topology.in_degrees(mask, output_dim).clamp(max=len(self.units) - 1)
        self.units += torch.bincount(degrees, minlength=len(self.units)).to(self.units)

    def compute(self) -> Tensor:
        """Return shares, of shape (largest + 1,), that sum to 1."""
        return self.units / self.units.sum().clamp(min=1)
