"""Latent storage: weights that are inactive live on, out of the network's sight.

Between optimizer steps the ordinary parameter holds *effective* weights, latent ones as a relaxation (``dst.relaxations``)
lets the network see them: forward and backward passes need nothing special, the gradient is dense, and ``state_dict`` has
the keys of the dense model and sparse weights. The latent weights take the parameter's place while the optimizer steps.
Optimizer state belongs to latent weights and is not cleared where a connection comes or goes.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dst.backends.masked import Masked
from dst.errors import ConfigurationError
from dst.pieces.protocols import LayerView
from dst.pieces.relaxations import LatentLayer, Relaxation, pressure
from dst.topology.layers import SparseLayer
from dst.topology.rewiring import Rewiring, fill_at_
from dst.topology.seeding import folded_generator
from dst.topology.sharding import is_sharded
from dst.topology.wrapping import drop_hooks


class Latent(Masked):
    """Storage of latent weights behind ordinary parameters; see ``dst.backends.storage.Storage``.

    Weights that are written from outside between steps (loaded, set by hand) become latent weights where they differ from
    the effective ones. A relaxation that ends with the first mask leaves masked storage behind.

    Args:
        model: The model.
        layers: The layers whose parameters these are.
        relaxation: What the network sees of latent weights.
        density: The method's.
        seed: The seed of random choices.

    Raises:
        ConfigurationError: A parameter that is spread over processes.
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
                    f"{name} is spread over processes, and latent weights are kept whole: train with DDP, or use a method "
                    'with backend="masked"'
                )
        self._relaxation, self._density, self._seed = relaxation, density, seed
        self._step = 0
        self._model = model
        self._ended = False  # whether the relaxation is over, and this is masked storage
        self._stepping: set[str] = set()  # parameters that hold latent weights, because their optimizer steps
        self._weights = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._learned: dict[str, dict[str, Tensor]] = {}
        self._noise: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in self.parameters}
        self._training = {name: owner.training for name, owner in self._owners.items()}
        self._hooks: list[RemovableHandle] = []
        self._start()
        self._draw(self.parameters)
        self._write(self.parameters)

    def _start(self) -> None:
        self._ended = False
        self._learned = {layer.label: self._initial(layer) for layer in self._layers}
        if self._relaxation.samples and not self._hooks:
            self._watch_modes()

    def _watch_modes(self) -> None:
        hook, above = _ModeHook(self), _modules_above(self._model, self.parameters)
        self._hooks = [module.register_forward_pre_hook(hook) for module in above]

    def __getstate__(self) -> dict[str, Any]:
        untouched = [name for name, p in self.parameters.items() if self._versions.get(name) == p._version]
        return {**self.__dict__, "_hooks": bool(self._hooks), "_versions": untouched}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Serve the parameters and modules of the copy, which count their versions anew and have idle hooks."""
        self.__dict__.update(state, _hooks=[])
        self._versions = {name: self.parameters[name]._version for name in state["_versions"]}
        for module in _modules_above(self._model, self.parameters):
            drop_hooks(module, lambda hook: isinstance(hook, _ModeHook))
        if state["_hooks"]:
            self._watch_modes()

    def _end(self) -> None:
        self._ended = True
        self._weights, self._learned, self._noise = {}, {}, {}
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _initial(self, layer: SparseLayer) -> dict[str, Tensor]:
        weight = layer.part(self.parameters[layer.parameter].detach())
        return self._relaxation.learned(weight, folded_generator(self._seed, "learned", layer.label))

    # -- what the network sees ------------------------------------------------------------------------------------

    def _layers_of(self, names: Collection[str]) -> list[SparseLayer]:
        return [layer for layer in self._layers if layer.parameter in names]

    def _names(self, parameters: Iterable[nn.Parameter]) -> list[str]:
        chosen = {id(p) for p in parameters}
        return [name for name, p in self.parameters.items() if id(p) in chosen]

    def _layer(self, layer: SparseLayer) -> LatentLayer:
        name = layer.parameter
        weight = layer.part(self._follow(name))
        learned, noise = self._learned[layer.label], self._noise.get(layer.label)
        if noise is not None and noise.device != weight.device:
            noise = self._noise[layer.label] = noise.to(weight.device)
        for key, value in learned.items():
            if value.dtype != torch.int64 and value.device != weight.device:  # counts are read by the host
                learned[key] = value.to(weight.device)
        return LatentLayer(weight, layer.part(self._masks[name].to(weight.device)), learned, noise)

    def _follow(self, name: str) -> Tensor:
        """The latent weights of a parameter, where and of what type it now is."""
        parameter, weights = self.parameters[name], self._weights[name]
        if weights.dtype != parameter.dtype or weights.device != parameter.device:
            weights = self._weights[name] = weights.to(parameter.device, parameter.dtype)
        return weights

    def _effective(self, name: str, training: bool) -> Tensor:
        result = self._follow(name).clone()
        for layer in self._layers_of([name]):
            layer.part(result).copy_(self._relaxation.effective(self._layer(layer), training))
        return result

    @torch.no_grad()
    def _write(self, names: Iterable[str]) -> None:
        """Put effective weights into the parameters."""
        for name in names:
            parameter = self.parameters[name]
            parameter.detach().copy_(self._effective(name, self._training[name]))
            self._versions[name] = parameter._version

    @torch.no_grad()
    def _absorb(self, names: Iterable[str]) -> None:
        """Take over what somebody else has written into the parameters."""
        for name in names:
            parameter = self.parameters[name]
            if self._versions.get(name) == parameter._version or name in self._stepping:
                continue
            weights, found = self._follow(name), parameter.detach()
            written = found != self._effective(name, True)
            if self._relaxation.samples:  # a checkpoint may have been saved in either mode
                written &= found != self._effective(name, False)
            weights.copy_(torch.where(written, found, weights))
            self._versions[name] = parameter._version

    def _draw(self, names: Collection[str]) -> None:
        """The random numbers of the step to come, a function of seed, step and layer."""
        for layer in self._layers_of(names) if self._relaxation.samples else []:
            generator = folded_generator(self._seed, "gates", self._step, layer.label)
            u = torch.rand(layer.shape, generator=generator).clamp_(1e-6, 1 - 1e-6)
            self._noise[layer.label] = u.logit().to(self.parameters[layer.parameter].device)

    @torch.no_grad()
    def follow_mode(self) -> None:
        """Compute with random or with deterministic weights, as the modules are training or not."""
        for name, owner in self._owners.items():
            if name in self._stepping:
                continue
            # Weights that were loaded may be those of the other mode.
            if owner.training != self._training[name] or self._versions[name] != self.parameters[name]._version:
                self._absorb([name])
                self._training[name] = owner.training
                self._write([name])

    # -- one optimizer step ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin_step(self, optimizer: Optimizer, parameters: Collection[nn.Parameter]) -> None:
        """See ``Storage``."""
        names = [] if self._ended else [n for n in self._names(parameters) if n not in self._stepping]
        self._absorb(names)
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
            parameter.detach().copy_(self._follow(name))
            self._stepping.add(name)

    @torch.no_grad()
    def end_step(self, parameters: Collection[nn.Parameter], step: int, steps: int) -> None:
        """See ``Storage``."""
        if self._ended:
            super().end_step(parameters, step, steps)
            return
        names = self._names(parameters)
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
        self._absorb([name for name in names if name not in stepped])
        if stepped:
            self._step = step
            if self._relaxation.until_mask:
                self._regulate(self._layers_of(stepped), step, steps)
            self._draw(stepped)
        self._write(names)

    def _regulate(self, layers: Sequence[SparseLayer], step: int, steps: int) -> None:
        """Bring the learned density where it should be."""
        views = [self._layer(layer) for layer in layers]
        density = sum(map(self._relaxation.expected, views)) / max(1, sum(view.weight.numel() for view in views))
        push = pressure(density, step / max(1, steps), self._density, max(1, steps))
        for view in views:
            self._relaxation.shift(view, push)

    def release(self) -> None:
        """See ``Storage``."""
        self._remove_hooks()
        if not self._ended:
            self._absorb(self.parameters)
            self._training = dict.fromkeys(self.parameters, not self._relaxation.samples)
            self._write(self.parameters)

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
        """See ``Storage``; scores see latent weights."""
        view = super().view(layer, generator, gradient=gradient, mask=mask, buffer=buffer)
        if self._ended:
            return view
        self._absorb([layer.parameter])
        latent = self._layer(layer)
        return dataclasses.replace(view, weight=latent.weight, importance=self._relaxation.importance(latent))

    def set_mask(self, positions: Mapping[str, Tensor]) -> None:
        """See ``Storage``; a relaxation that lasts until there is a mask is over."""
        self._absorb(self.parameters)
        if self._relaxation.until_mask and not self._ended:
            self._training = dict.fromkeys(self.parameters, False)
            self._write(self.parameters)
            self._end()
        super().set_mask(positions)
        if not self._ended:
            for layer in self._layers:
                self._select(layer)

    def _select(self, layer: SparseLayer) -> None:
        ties = folded_generator(self._seed, "latent ties", self._step, layer.label)
        self._relaxation.select(self._layer(layer), self._density, ties)

    @torch.no_grad()
    def apply(self, layer: SparseLayer, rewiring: Rewiring, optimizer: Optimizer) -> None:
        """See ``Storage``; latent weights and optimizer state stay, what was inactive shows what it has become."""
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
        self._write([name])

    @torch.no_grad()
    def mask_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """See ``Storage``; gradients that reach no latent weight are zero, those of inactive weights may not be."""
        if self._ended:
            super().mask_gradients(parameters)
            return
        for name in self._names(parameters):
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
            names = self._names(parameters)
            self._absorb(names)
            self._write(names)

    def mask_optimizer_state(self, optimizer: Optimizer) -> None:
        """See ``Storage``; the state of latent weights is kept."""
        if self._ended:
            super().mask_optimizer_state(optimizer)

    def rescale(self, layer: SparseLayer) -> None:
        """Not available: effective weights would be scaled, and latent ones not."""
        raise ConfigurationError("initial weights cannot be rescaled under latent storage; use rescale_init=False")

    # -- saving and loading ---------------------------------------------------------------------------------------

    def state(self) -> dict[str, dict[str, Tensor]]:
        """See ``Storage``."""
        state = super().state()
        if not self._ended:
            self._absorb(self.parameters)
            learned = {f"{x.label}/{key}": value for x in self._layers for key, value in self._learned[x.label].items()}
            state["latent"] = {name: value.clone() for name, value in {**self._weights, **learned}.items()}
        return state

    def latent_shapes(self, masked: bool) -> dict[str, tuple[int, ...]]:
        """See ``Storage``."""
        if masked and self._relaxation.until_mask:
            return {}
        shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        for layer in self._layers:
            shapes |= {f"{layer.label}/{key}": tuple(value.shape) for key, value in self._initial(layer).items()}
        return shapes

    @torch.no_grad()
    def load(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """See ``Storage``; without latent weights in the state, this is masked storage from here on."""
        self._stepping = set()
        for name, parameter in self.parameters.items():
            # Weights that were loaded before construction were changed by it: undo that. Others were loaded since.
            if not self._ended and self._versions[name] == parameter._version:
                parameter.detach().copy_(self._follow(name))
        self._end()
        super().load(state, step)
        self._step = step
        saved = state["latent"]
        if not saved.keys() >= self.parameters.keys():
            return
        self._start()
        for name, parameter in self.parameters.items():
            self._weights[name] = saved[name].to(parameter.device, parameter.dtype).clone()
        for layer in self._layers:
            for key, value in self._learned[layer.label].items():
                loaded = saved[f"{layer.label}/{key}"].to(value.dtype).clone()
                self._learned[layer.label][key] = loaded.to(value.device)
        self._training = {name: owner.training for name, owner in self._owners.items()}
        self._draw(self.parameters)
        self._write(self.parameters)


class _ModeHook:
    """A forward pre-hook that tells the storage when modules change between training and evaluation.

    Copies of a model must not write into the original's storage, nor carry one along: copies of the hook do nothing.
    """

    def __init__(self, storage: Latent | None = None) -> None:
        self._storage = None if storage is None else weakref.ref(storage)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        storage = None if self._storage is None else self._storage()
        if storage is not None:
            storage.follow_mode()

    def __reduce__(self) -> tuple[type[_ModeHook], tuple[()]]:
        return _ModeHook, ()


def _modules_above(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The modules that own the parameters, and those that contain these: whichever is called, one of them is."""
    prefixes: dict[str, None] = {}
    for name in names:
        parts = name.split(".")[:-1]
        prefixes |= dict.fromkeys(".".join(parts[:i]) for i in range(len(parts) + 1))
    return [model.get_submodule(prefix) for prefix in prefixes]
