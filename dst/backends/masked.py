"""The masked backend: ordinary parameters with zeros in place.

The parameter keeps its name, shape and dense gradient. Masking is one pass over weights and gradients per step: a bitwise
"and" with integers as wide as the weights, all ones where active and all zeros where inactive. It costs as much as a
multiplication by masks in the weights' dtype (a fifteenth of one by bool masks), and also zeros infinities and NaNs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dst.backends.saved import as_mask, union_as_mask
from dst.backends.storage import Scoring, Storage
from dst.errors import ConfigurationError
from dst.pieces.protocols import LayerView
from dst.planning.selection import select
from dst.planning.update import LayerUpdate
from dst.topology.layers import SparseLayer
from dst.topology.optimizer_state import clear_state, mask_state
from dst.topology.rewiring import Rewiring, fill_at_
from dst.topology.sharding import is_sharded, local, local_positions, part_of, spread, whole

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class BitMasks:
    """Integer masks in the width and layout of the parameters. Fully active parameters have none."""

    def __init__(self) -> None:
        self._tensors: dict[nn.Parameter, Tensor] = {}

    def set(self, parameter: nn.Parameter, mask: Tensor) -> None:
        """Set the mask of a parameter (bool, of the shape of its local shard)."""
        if bool(mask.all()):
            self._tensors.pop(parameter, None)
        else:
            self._tensors[parameter] = _expand(mask, local(parameter.detach()))

    def rewire(self, parameter: nn.Parameter, rewiring: Rewiring, mask: Tensor) -> None:
        """Apply a topology update that leads to ``mask``. Positions are those of the local shard."""
        if parameter in self._tensors:
            rewiring.apply_(self._tensors[parameter], one=-1)
        elif rewiring.dropped.numel():
            self.set(parameter, mask)  # it was fully active

    def mask_weights(self, parameters: Iterable[nn.Parameter]) -> None:
        """Set the inactive weights of ``parameters`` to zero, in place. Call it without grad mode."""
        for parameter in parameters:
            if (bits := self._tensors.get(parameter)) is not None:
                self._apply(local(parameter.detach()), parameter, bits)

    def mask_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Set the gradients of inactive weights to zero, in place. Call it without grad mode.

        Parameters without a gradient are skipped.
        """
        for parameter in parameters:
            if (bits := self._tensors.get(parameter)) is not None and (gradient := parameter.grad) is not None:
                self._apply(local(gradient), parameter, bits)

    def _apply(self, tensor: Tensor, parameter: nn.Parameter, bits: Tensor) -> None:
        if bits.device != tensor.device or bits.element_size() != tensor.element_size():
            bits = self._tensors[parameter] = _expand(bits.bool(), tensor)
        tensor.view(bits.dtype).bitwise_and_(bits)


def _expand(mask: Tensor, like: Tensor) -> Tensor:
    """-1 (all ones) where active and 0 elsewhere, with the strides of ``like``."""
    return torch.empty_like(like, dtype=_INTEGERS[like.element_size()]).copy_(mask).neg_()


class Masked(Storage):
    """Storage in ordinary parameters; see ``dst.backends.storage.Storage``.

    Args:
        parameters: Name to parameter.
        layers: The layers of the parameters.
    """

    backend = "masked"

    def __init__(self, parameters: Mapping[str, nn.Parameter], layers: Sequence[SparseLayer]) -> None:
        for name, parameter in parameters.items():
            _check_parameter(name, parameter)
        self.parameters: Mapping[str, nn.Parameter] = dict(parameters)
        self.active = {layer.label: layer.weights for layer in layers}
        self._layers = list(layers)
        self._masks = {n: torch.ones_like(local(p), dtype=torch.bool) for n, p in self.parameters.items()}
        self._union: dict[str, Tensor] = {}
        self._bits = BitMasks()
        self._averages: list[dict[str, Tensor]] = []

    def masks(self) -> dict[str, Tensor]:
        """See ``Storage``."""
        return {name: spread(mask, self.parameters[name]) for name, mask in self._masks.items()}

    def mask_of(self, name: str) -> Tensor | None:
        """See ``Storage``."""
        return self._masks[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """See ``Storage``."""
        return tuple(self.parameters[name].shape)

    def view(
        self,
        layer: SparseLayer,
        generator: torch.Generator,
        *,
        gradient: bool = False,
        buffer: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> LayerView:
        """See ``Storage``. ``mask`` avoids gathering a mask that the caller has."""
        parameter = self.parameters[layer.parameter]
        dense = parameter.grad if gradient else None
        return LayerView(
            weight=layer.part(whole(parameter.detach())),
            mask=self._whole_mask(layer) if mask is None else mask,
            gradient=None if dense is None else layer.part(whole(dense)),
            buffer=buffer,
            generator=generator,
        )

    def _whole_mask(self, layer: SparseLayer) -> Tensor:
        return layer.part(whole(spread(self._masks[layer.parameter], self.parameters[layer.parameter])))

    def set_mask(self, positions: Mapping[str, Tensor]) -> None:
        """See ``Storage``."""
        masks = {n: torch.ones(p.shape, dtype=torch.bool, device=local(p).device) for n, p in self.parameters.items()}
        for layer in self._layers:
            mask = layer.part(masks[layer.parameter]).zero_()
            fill_at_(mask, positions[layer.label].to(mask.device), 1)
        self._take_over(masks)

    @torch.no_grad()
    def _take_over(self, masks: Mapping[str, Tensor]) -> None:
        self.active = {layer.label: int(layer.part(masks[layer.parameter]).sum()) for layer in self._layers}
        for name, mask in masks.items():
            self._masks[name] = part_of(mask, self.parameters[name]).clone()
            self._bits.set(self.parameters[name], self._masks[name])
        self.mask_weights(self.parameters.values())
        self._mask_averages()

    def rescale(self, layer: SparseLayer) -> None:
        """See ``Storage``."""
        mask = self._whole_mask(layer)
        inputs = [d for d in range(mask.ndim) if d != layer.output_dim]
        active = mask.sum(dim=inputs, keepdim=True)
        fan_in = layer.weights // layer.shape[layer.output_dim]
        parameter = self.parameters[layer.parameter]
        scale = torch.ones(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        layer.part(scale).mul_((fan_in / active.clamp(min=1)).sqrt().to(scale.dtype))
        local(parameter.detach()).mul_(part_of(scale, parameter))

    def decide(self, update: LayerUpdate, scoring: Scoring) -> Rewiring | None:
        """See ``Storage``."""
        mask, views = self._whole_mask(update.layer), {}
        needed = scoring.scores if update.grow else {"drop": scoring.scores["drop"]}
        for role, score in needed.items():
            view = views[role] = self.view(
                update.layer,
                scoring.generator(role),
                gradient=score.needs_gradient,
                mask=mask,
                buffer=scoring.buffers.get(role),
            )
            if score.needs_gradient and (view.buffer if score.observes else view.gradient) is None:
                return None
        return select(update, needed, views, scoring.generator("ties"))

    def apply(self, layer: SparseLayer, rewiring: Rewiring, optimizer: Optimizer) -> None:
        """See ``Storage``. The gradient is dense and needs no change."""
        name, parameter = layer.parameter, self.parameters[layer.parameter]
        here = Rewiring(
            local_positions(rewiring.grown + layer.offset, parameter),
            local_positions(rewiring.dropped + layer.offset, parameter),
        )
        self._masks[name] = here.apply_(self._masks[name].clone())  # callers may hold the old mask
        if self._union:
            fill_at_(self._union[name], here.grown, 1)
        fill_at_(local(parameter.detach()), here.dropped, 0)
        clear_state(optimizer, parameter, torch.cat([here.grown, here.dropped]))
        for average in self._averages:
            copy = local(average[name].detach())  # may be on another device
            fill_at_(copy, here.dropped.to(copy.device), 0)
        self._bits.rewire(parameter, here, self._masks[name])
        self.active[layer.label] += rewiring.grown.numel() - rewiring.dropped.numel()

    def mask_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """See ``Storage``."""
        self._bits.mask_gradients(parameters)

    def mask_weights(self, parameters: Iterable[nn.Parameter]) -> None:
        """See ``Storage``."""
        self._bits.mask_weights(parameters)

    def mask_optimizer_state(self, optimizer: Optimizer) -> None:
        """See ``Storage``."""
        for name, parameter in self.parameters.items():
            mask_state(optimizer, parameter, self._masks[name])

    def track_average(self, model: nn.Module) -> None:
        """See ``Storage``."""
        named = dict(model.named_parameters())
        if missing := sorted(set(self.parameters) - set(named)):
            raise ConfigurationError(f"the averaged model has no {', '.join(missing)}; it must be a copy of the model")
        average: dict[str, Tensor] = {name: named[name] for name in self.parameters}
        if not any(known[n] is p for known in self._averages for n, p in list(average.items())[:1]):
            self._averages.append(average)
        self._mask_averages()

    def _mask_averages(self) -> None:
        for average in self._averages:
            for name, mask in self._masks.items():
                local(average[name].detach()).masked_fill_(~mask.to(average[name].device), 0)

    def explore(self) -> None:
        """See ``Storage``."""
        self._union = {name: mask.clone() for name, mask in self._masks.items()}

    def explored(self, layer: SparseLayer) -> float:
        """See ``Storage``."""
        union = self._union.get(layer.parameter)
        if union is None:
            return self.active[layer.label]
        return int(layer.part(whole(spread(union, self.parameters[layer.parameter]))).sum())

    def signatures(self) -> Iterable[tuple[str, Tensor]]:
        """See ``Storage``."""
        return [(n, mask) for n, mask in sorted(self._masks.items()) if not is_sharded(self.parameters[n])]

    def state(self) -> dict[str, dict[str, Tensor]]:
        """See ``Storage``."""
        return {"masks": self._whole_copies(self._masks), "union": self._whole_copies(self._union), "latent": {}}

    def _whole_copies(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: whole(spread(mask, self.parameters[name])).clone() for name, mask in masks.items()}

    def load(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """See ``Storage``."""
        masks, union = state["masks"], state["union"]
        here = {n: local(p).device for n, p in self.parameters.items()}
        self._take_over({n: as_mask(masks[n], self.shape(n)).to(here[n]) for n in self.parameters})
        self._union = {}
        # The order of collectives for sharded parameters must be the same on all ranks; the order of a set is not.
        for name in (n for n in self.parameters if n in union):
            explored = union_as_mask(union[name], self.shape(name))
            self._union[name] = part_of(explored.to(here[name]), self.parameters[name]).clone()


def _check_parameter(name: str, parameter: Tensor) -> None:
    if parameter.device.type == "meta":
        raise ConfigurationError(f"{name} is on the meta device: allocate it first (model.to_empty, or load weights)")
    if any(step == 0 and size > 1 for step, size in zip(parameter.stride(), parameter.shape, strict=True)):
        raise ConfigurationError(f"{name} is expanded, and its entries share memory: call .contiguous()")
    if not parameter.is_floating_point():
        raise ConfigurationError(f"{name} has dtype {parameter.dtype}; only floating-point weights can be sparse")
