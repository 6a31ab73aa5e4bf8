"""Linear warm-up of the updates to newly grown weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dst.errors import ConfigurationError, StateError
from dst.topology.layers import SparseLayer
from dst.topology.rewiring import Rewiring
from dst.topology.selection import without
from dst.topology.sharding import is_sharded


class WarmUp:
    """Scales the updates to newly grown weights: by 1/n at their first step, up to 1 at the n-th.

    A grown weight has no moments yet. Adam's bias correction is over by then, so its first steps are several times the
    learning rate (with β = (0.9, 0.999) a factor of 0.1 / √0.001 ≈ 3.2), and the loss spikes. Warm-up keeps these steps
    small until the moments are estimated (SMET, https://arxiv.org/abs/2606.00888). Moments are updated as usual. Only the
    change of the weights is scaled, for any optimizer.

    Args:
        steps: n, >= 1.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._young: dict[str, tuple[SparseLayer, Tensor, Tensor]] = {}  # label to layer, sorted positions, birth steps
        self._before: dict[str, Tensor] = {}

    def follow(self, layer: SparseLayer, rewiring: Rewiring, step: int) -> None:
        """Follow grown weights, which ``step`` updates first, and forget dropped ones."""
        born = torch.full(rewiring.grown.shape, step, dtype=torch.int64, device=rewiring.grown.device)
        positions = rewiring.grown
        if layer.label in self._young:
            _, old, ages = self._young[layer.label]
            left = without(old, rewiring.dropped.sort().values)
            ages = ages[torch.searchsorted(old, left)]
            positions, order = torch.cat([left, positions]).sort()
            born = torch.cat([ages, born])[order]
        self._young[layer.label] = (layer, positions, born)

    def begin(self, parameters: Collection[nn.Parameter], name_of: Callable[[nn.Parameter], str | None]) -> None:
        """Save the values of newly grown weights before the step."""
        named = {name_of(p): p for p in parameters}
        self._before = {
            label: named[layer.parameter].detach().take(positions + layer.offset)
            for label, (layer, positions, _) in self._young.items()
            if layer.parameter in named
        }

    @torch.no_grad()
    def end(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Scale the change of the newly grown weights in ``step``, which was just taken."""
        for label, before in self._before.items():
            layer, positions, born = self._young[label]
            weight = parameters[layer.parameter].detach()
            where = positions + layer.offset
            share = ((step - born + 1) / self._steps).clamp(0, 1).to(weight.dtype)
            weight.put_(where, before + share * (weight.take(where) - before))
            young = step - born + 1 < self._steps
            self._young[label] = (layer, positions[young], born[young])
        self._before = {}

    def state(self) -> dict[str, Any]:
        """Label to positions and birth steps."""
        return {label: [positions.clone(), born.clone()] for label, (_, positions, born) in self._young.items()}

    def load(
        self, state: Mapping[str, Any], layers: Mapping[str, SparseLayer], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Continue from a ``state`` that passed ``check_young``."""
        self._young, self._before = {}, {}
        for label, (positions, born) in state.items():
            device = parameters[layers[label].parameter].device
            self._young[label] = (layers[label], positions.to(device).clone(), born.to(device).clone())


def check_young(state: Mapping[str, Any], layers: Mapping[str, SparseLayer]) -> None:
    """Raise ``StateError`` for what ``WarmUp.state`` cannot have returned for these layers."""
    for label, young in state.items():
        fits = label in layers and isinstance(young, (list, tuple)) and len(young) == 2
        fits = fits and all(isinstance(t, Tensor) and t.dtype == torch.int64 and t.ndim == 1 for t in young)
        if fits and young[0].shape == young[1].shape:
            positions = young[0]
            if not positions.numel() or 0 <= int(positions.min()) <= int(positions.max()) < layers[label].weights:
                continue
        raise StateError(f"the state is damaged: grown weights of {label} do not fit the model")


def check_whole(parameters: Mapping[str, nn.Parameter], setting: str) -> None:
    """Raise ``ConfigurationError`` for sharded parameters."""
    for name, parameter in parameters.items():
        if is_sharded(parameter):
            raise ConfigurationError(f"{setting} works on whole weights, and {name} is a DTensor: leave it out")
