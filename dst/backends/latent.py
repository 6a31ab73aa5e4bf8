"""The latent backend: the optimizer moves dense latent weights, and the forward pass uses sparse effective weights.

Between optimizer steps the parameter holds the effective weights that a relaxation (``dst.relaxations``) computes from the
latent weights. Forward and backward passes need no change, the gradient is dense, and ``state_dict`` has the keys of the
dense model and sparse weights. During the optimizer step the parameter holds the latent weights. Optimizer state belongs
to the latent weights, and a topology update does not clear it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dst.backends.masked import Masked
from dst.backends.mode_hooks import ModeHook, ModeHooks
from dst.errors import ConfigurationError
from dst.pieces.protocols import LayerView
from dst.pieces.relaxations import LatentLayer, Relaxation, pressure
from dst.topology.layers import SparseLayer
from dst.topology.rewiring import Rewiring, fill_at_
from dst.topology.seeding import folded_generator
from dst.topology.sharding import is_sharded


class Latent(Masked):
    """Storage of latent weights; see ``dst.backends.storage.Storage``.

    Weights that other code writes into a parameter between steps (such as ``load_state_dict``) become latent weights where
    they differ from the effective ones. After a relaxation that ends with the first mask this is masked storage.

    Args:
        model: The model.
        layers: The sparse layers to store.
        relaxation: Computes effective weights from latent weights.
        density: Density of the method.
        seed: Seed of random choices.

    Raises:
        ConfigurationError: A parameter is sharded.
    """

    backend = "latent"

    def __init__(
        self, model: nn.Module, layers: Sequence[SparseLayer], relaxation: Relaxation, *, density: float, seed: int
    ) -> None:
        named = dict(model.named_parameters())
        super().__init__({x.parameter: named[x.parameter] for x in layers}, layers)
        for name, parameter in self.parameters.items():
            if is_sharded(parameter):
                raise ConfigurationError(
                    f"{name} is sharded, and the latent backend needs whole tensors: train with DDP, or use a method with "
                    'backend="masked"'
                )
        self._relaxation, self._density, self._seed = relaxation, density, seed
        self._step = 0
        self._model = model
        self._ended = False  # whether the relaxation has ended, and this is masked storage
        self._stepping: set[str] = set()  # parameters that hold latent weights during an optimizer step
        self._weights = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._learned: dict[str, dict[str, Tensor]] = {}
        self._noise: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in self.parameters}
        self._training = {name: owner.training for name, owner in self._owners.items()}
        self._hooks = ModeHooks(model, self.parameters)
        self._start_relaxation()
        self._draw_noise(self.parameters)
        self._write_effective(self.parameters)

    def _start_relaxation(self) -> None:
        self._ended = False
        self._learned = {layer.label: self._initial_learned(layer) for layer in self._layers}
        if self._relaxation.samples:
            self._hooks.install(self.follow_mode)

    def __getstate__(self) -> dict[str, Any]:
        untouched = [name for name, p in self.parameters.items() if self._versions.get(name) == p._version]
        return {**self.__dict__, "_hooks": self._hooks.installed, "_versions": untouched}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Adopt the parameters and modules of the copy. Their version counters start again, and their hooks do nothing."""
        self.__dict__.update(state)
        self._versions = {name: self.parameters[name]._version for name in state["_versions"]}
        self._hooks = ModeHooks(self._model, self.parameters)
        self._hooks.drop_copies()
        if state["_hooks"]:
            self._hooks.install(self.follow_mode)

    def _end_relaxation(self) -> None:
        self._ended = True
        self._weights, self._learned, self._noise = {}, {}, {}
        self._hooks.remove()

    def _initial_learned(self, layer: SparseLayer) -> dict[str, Tensor]:
        weight = layer.part(self.parameters[layer.parameter].detach())
        return self._relaxation.learned(weight, folded_generator(self._seed, "learned", layer.label))

    # -- latent and effective weights -----------------------------------------------------------------------------

    def _layers_of(self, names: Collection[str]) -> list[SparseLayer]:
        return [layer for layer in self._layers if layer.parameter in names]

    def _names_of(self, parameters: Iterable[nn.Parameter]) -> list[str]:
        chosen = {id(p) for p in parameters}
        return [name for name, p in self.parameters.items() if id(p) in chosen]

    def _layer(self, layer: SparseLayer) -> LatentLayer:
        name = layer.parameter
        weight = layer.part(self._latent(name))
        learned, noise = self._learned[layer.label], self._noise.get(layer.label)
        if noise is not None and noise.device != weight.device:
            noise = self._noise[layer.label] = noise.to(weight.device)
        for key, value in learned.items():
            if value.dtype != torch.int64 and value.device != weight.device:  # counts stay on the CPU
                learned[key] = value.to(weight.device)
        return LatentLayer(weight, layer.part(self._masks[name].to(weight.device)), learned, noise)

    def _latent(self, name: str) -> Tensor:
        """The latent weights of a parameter, with its current device and dtype."""
        parameter, weights = self.parameters[name], self._weights[name]
        if weights.dtype != parameter.dtype or weights.device != parameter.device:
            weights = self._weights[name] = weights.to(parameter.device, parameter.dtype)
        return weights

    def _effective(self, name: str, training: bool) -> Tensor:
        result = self._latent(name).clone()
        for layer in self._layers_of([name]):
            layer.part(result).copy_(self._relaxation.effective(self._layer(layer), training))
        return result

    @torch.no_grad()
    def _write_effective(self, names: Iterable[str]) -> None:
        """Write effective weights into the parameters."""
        for name in names:
            parameter = self.parameters[name]
            parameter.detach().copy_(self._effective(name, self._training[name]))
            self._versions[name] = parameter._version

    @torch.no_grad()
    def _absorb_writes(self, names: Iterable[str]) -> None:
        """Copy values that other code has written into the parameters to the latent weights."""
        for name in names:
            parameter = self.parameters[name]
            if self._versions.get(name) == parameter._version or name in self._stepping:
                continue
            weights, found = self._latent(name), parameter.detach()
            written = found != self._effective(name, True)
            if self._relaxation.samples:  # a loaded checkpoint may be of either mode
                written &= found != self._effective(name, False)
            weights.copy_(torch.where(written, found, weights))
            self._versions[name] = parameter._version

    def _draw_noise(self, names: Collection[str]) -> None:
        """Draw the noise of the next step, a function of seed, step and layer."""
        for layer in self._layers_of(names) if self._relaxation.samples else []:
            generator = folded_generator(self._seed, "gates", self._step, layer.label)
            u = torch.rand(layer.shape, generator=generator).clamp_(1e-6, 1 - 1e-6)
            self._noise[layer.label] = u.logit().to(self.parameters[layer.parameter].device)

    @torch.no_grad()
    def follow_mode(self) -> None:
        """Use sampled weights in training mode and deterministic weights in evaluation mode."""
        for name, owner in self._owners.items():
            if name in self._stepping:
                continue
            # Loaded weights may be of the other mode.
            if owner.training != self._training[name] or self._versions[name] != self.parameters[name]._version:
                self._absorb_writes([name])
                self._training[name] = owner.training
                self._write_effective([name])

    # -- one optimizer step ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin_step(self, optimizer: Optimizer, parameters: Collection[nn.Parameter]) -> None:
        """See ``Storage``."""
        names = [] if self._ended else [n for n in self._names_of(parameters) if n not in self._stepping]
        self._absorb_writes(names)
        rates = {
            id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"] if "lr" in group
        }
        for name in names:
            parameter = self.parameters[name]
            if parameter.grad is not None:
                for layer in self._layers_of([name]):
                    gradient = layer.part(parameter.grad)
                    rate = rates.get(id(parameter), 0.0)
                    gradient.copy_(self._relaxation.backward(self._layer(layer), gradient, rate))
            parameter.detach().copy_(self._latent(name))
            self._stepping.add(name)

    @torch.no_grad()
    def end_step(self, parameters: Collection[nn.Parameter], step: int, steps: int) -> None:
        """See ``Storage``."""
        if self._ended:
            super().end_step(parameters, step, steps)
            return
        names = self._names_of(parameters)
        stepped = [name for name in names if name in self._stepping]
        for name in stepped:
            found = self.parameters[name].detach().clone()
            for layer in self._layers_of([name]):
                frozen = self._relaxation.frozen(self._layer(layer))
                if frozen is not None:
                    part = layer.part(found)
                    part.copy_(torch.where(frozen, layer.part(self._weights[name]), part))
            self._weights[name] = found
        self._stepping.difference_update(stepped)
        self._absorb_writes([name for name in names if name not in stepped])
        if stepped:
            self._step = step
            if self._relaxation.until_mask:
                self._regulate_density(self._layers_of(stepped), step, steps)
            self._draw_noise(stepped)
        self._write_effective(names)

    def _regulate_density(self, layers: Sequence[SparseLayer], step: int, steps: int) -> None:
        """Push the learned density towards its target."""
        views = [self._layer(layer) for layer in layers]
        density = sum(map(self._relaxation.expected, views)) / max(1, sum(view.weight.numel() for view in views))
        push = pressure(density, step / max(1, steps), self._density, max(1, steps))
        for view in views:
            self._relaxation.shift(view, push)

    def release(self) -> None:
        """See ``Storage``."""
        self._hooks.remove()
        if not self._ended:
            self._absorb_writes(self.parameters)
            self._training = dict.fromkeys(self.parameters, not self._relaxation.samples)
            self._write_effective(self.parameters)

    # -- the mask -------------------------------------------------------------------------------------------------

    def view(
        self,
        layer: SparseLayer,
        generator: torch.Generator,
        *,
        gradient: bool = False,
        mask: Tensor | None = None,
        buffer: Tensor | None = None,
    ) -> LayerView:
        """See ``Storage``. Scores see latent weights."""
        view = super().view(layer, generator, gradient=gradient, mask=mask, buffer=buffer)
        if self._ended:
            return view
        self._absorb_writes([layer.parameter])
        latent = self._layer(layer)
        return dataclasses.replace(view, weight=latent.weight, importance=self._relaxation.importance(latent))

    def set_mask(self, positions: Mapping[str, Tensor]) -> None:
        """See ``Storage``. Ends a relaxation that lasts until the first mask."""
        self._absorb_writes(self.parameters)
        if self._relaxation.until_mask and not self._ended:
            self._training = dict.fromkeys(self.parameters, False)
            self._write_effective(self.parameters)
            self._end_relaxation()
        super().set_mask(positions)
        if not self._ended:
            for layer in self._layers:
                self._select(layer)

    def _select(self, layer: SparseLayer) -> None:
        ties = folded_generator(self._seed, "latent ties", self._step, layer.label)
        self._relaxation.select(self._layer(layer), self._density, ties)

    @torch.no_grad()
    def apply(self, layer: SparseLayer, rewiring: Rewiring, optimizer: Optimizer) -> None:
        """See ``Storage``. Latent weights and optimizer state do not change; grown weights show their latent value."""
        if self._ended:
            super().apply(layer, rewiring, optimizer)
            return
        name = layer.parameter
        here = Rewiring(rewiring.grown + layer.offset, rewiring.dropped + layer.offset)
        self._masks[name] = here.apply_(self._masks[name].clone())
        if self._union:
            fill_at_(self._union[name], here.grown, 1)
        for average in self._averages:
            fill_at_(average[name].detach(), here.dropped.to(average[name].device), 0)
        self.active[layer.label] = int(layer.part(self._masks[name]).sum())
        self._select(layer)
        self._write_effective([name])

    @torch.no_grad()
    def mask_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """See ``Storage``. Zeros only gradients that the relaxation does not use; inactive weights may train."""
        if self._ended:
            super().mask_gradients(parameters)
            return
        for name in self._names_of(parameters):
            gradient = self.parameters[name].grad
            if gradient is None:
                continue
            for layer in self._layers_of([name]):
                trained = self._relaxation.trained(self._layer(layer))
                if trained is not None:
                    layer.part(gradient).masked_fill_(~trained, 0)

    def mask_weights(self, parameters: Iterable[nn.Parameter]) -> None:
        """See ``Storage``."""
        if self._ended:
            super().mask_weights(parameters)
        else:
            names = self._names_of(parameters)
            self._absorb_writes(names)
            self._write_effective(names)

    def mask_optimizer_state(self, optimizer: Optimizer) -> None:
        """See ``Storage``. The state of latent weights is kept."""
        if self._ended:
            super().mask_optimizer_state(optimizer)

    def rescale(self, layer: SparseLayer) -> None:
        """Not supported: it would scale effective weights and not latent ones."""
        raise ConfigurationError("the latent backend cannot rescale initial weights; use rescale_init=False")

    # -- saving and loading ---------------------------------------------------------------------------------------

    def state(self) -> dict[str, dict[str, Tensor]]:
        """See ``Storage``."""
        state = super().state()
        if not self._ended:
            self._absorb_writes(self.parameters)
            learned = {f"{x.label}/{key}": value for x in self._layers for key, value in self._learned[x.label].items()}
            state["latent"] = {name: value.clone() for name, value in {**self._weights, **learned}.items()}
        return state

    def latent_shapes(self, masked: bool) -> dict[str, tuple[int, ...]]:
        """See ``Storage``."""
        if masked and self._relaxation.until_mask:
            return {}
        shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        for layer in self._layers:
            shapes |= {
                f"{layer.label}/{key}": tuple(value.shape) for key, value in self._initial_learned(layer).items()
            }
        return shapes

    @torch.no_grad()
    def load(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """See ``Storage``. If the state has no latent weights, the relaxation ends."""
        self._stepping = set()
        for name, parameter in self.parameters.items():
            # Nothing has overwritten the effective weights: restore the latent ones.
            if not self._ended and self._versions[name] == parameter._version:
                parameter.detach().copy_(self._latent(name))
        self._end_relaxation()
        super().load(state, step)
        self._step = step
        saved = state["latent"]
        if not saved.keys() >= self.parameters.keys():
            return
        self._start_relaxation()
        for name, parameter in self.parameters.items():
            self._weights[name] = saved[name].to(parameter.device, parameter.dtype).clone()
        for layer in self._layers:
            for key, value in self._learned[layer.label].items():
                loaded = saved[f"{layer.label}/{key}"].to(value.dtype).clone()
                self._learned[layer.label][key] = loaded.to(value.device)
        self._training = {name: owner.training for name, owner in self._owners.items()}
        self._draw_noise(self.parameters)
        self._write_effective(self.parameters)


_ModeHook = ModeHook
"""Pickled models refer to the hook by this name."""
