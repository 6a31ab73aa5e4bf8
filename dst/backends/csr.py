"""The csr backend: only non-zeros are stored, in ``dst.nn.SparseLinear`` and ``dst.nn.SparseConv2d``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from dst.backends.explored import Explored
from dst.backends.saved import as_positions, narrow, union_as_bits
from dst.backends.storage import Scoring, Storage, is_finite
from dst.errors import ConfigurationError
from dst.kernels import engine
from dst.nn import SparseLinear, remap
from dst.pieces.protocols import LayerView, as_sampler
from dst.planning.update import LayerUpdate
from dst.topology.layers import SparseLayer, sparse_modules
from dst.topology.optimizer_state import per_weight_state
from dst.topology.rewiring import Rewiring, rewire
from dst.topology.selection import tie_key
from dst.topology.sharding import all_agree, average_


class Csr(Storage):
    """Storage in ``SparseLinear`` modules; see ``dst.backends.storage.Storage``.

    Args:
        modules: Name of the dense weight to module.
        layers: The layers of the modules.
        group: The process group.
    """

    backend = "csr"
    is_prepared = True

    def __init__(
        self, modules: Mapping[str, SparseLinear], layers: Sequence[SparseLayer], group: ProcessGroup | None = None
    ) -> None:
        self._modules, self._layers, self._group = dict(modules), list(layers), group
        self.parameters: Mapping[str, nn.Parameter] = {name: module.values for name, module in modules.items()}
        for name, values in self.parameters.items():
            if type(values) is not nn.Parameter or values.device.type != "cpu":
                raise ConfigurationError(
                    f"the non-zeros of {name} are {type(values).__name__} on {values.device}; the csr backend needs whole "
                    'tensors on the CPU: train there, or use backend="masked"'
                )
        self.active = self._counts()
        self._explored: dict[str, Explored] = {}
        self._averages: list[dict[str, SparseLinear]] = []

    def _counts(self) -> dict[str, int]:
        return {layer.label: self._span(layer).stop - self._span(layer).start for layer in self._layers}

    def _span(self, layer: SparseLayer) -> slice:
        """Where the active weights of a layer are in the row-major order of its module."""
        module = self._modules[layer.parameter]
        if layer.rows is None:
            return slice(0, module.nnz)
        pointers, (first, last) = module.pattern.row_pointers, layer.rows
        return slice(int(pointers[first]), int(pointers[last]))

    def masks(self) -> dict[str, Tensor]:
        """See ``Storage``. Builds the masks at every call."""
        return {name: module.mask() for name, module in self._modules.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """See ``Storage``."""
        return self._modules[name].shape

    def view(
        self,
        layer: SparseLayer,
        generator: torch.Generator,
        *,
        gradient: bool = False,
        buffer: Tensor | None = None,
    ) -> LayerView:
        """See ``Storage``."""
        module = self._modules[layer.parameter]
        return LayerView(layer.part(module.dense_weight()), layer.part(module.mask()), None, None, generator)

    def rescale(self, layer: SparseLayer) -> None:
        """See ``Storage``."""
        module = self._modules[layer.parameter]
        counts = module.pattern.row_pointers.diff()
        scale = (module.in_features / counts.clamp(min=1)).sqrt().to(module.values.dtype)
        if layer.rows is not None:
            first, last = layer.rows
            scale[:first], scale[last:] = 1, 1
        module.values.detach().mul_(scale[module.pattern.row_indices.to(torch.int64)])

    def decide(self, update: LayerUpdate, scoring: Scoring) -> Rewiring | None:
        """See ``Storage``. Scores see only the active weights, as vectors in row-major order."""
        layer, module = update.layer, self._modules[update.layer.parameter]
        drop, grow, ties = scoring.scores["drop"], scoring.scores["grow"], scoring.generator("ties")
        sampler = as_sampler(grow)
        gradient = module.values.grad if drop.needs_gradient else None
        if drop.needs_gradient and gradient is None:
            return None
        # All ranks must take the same branch: each tile of the gradient is reduced over them.
        if grow.needs_gradient and all_agree(not module.collected, self._group):
            return None
        span = self._span(layer)
        active, weight = module.positions()[span], module.row_major(module.values)[span]
        active = active - layer.offset if layer.offset else active
        ranking = drop(
            LayerView(
                weight,
                torch.ones_like(weight, dtype=torch.bool),
                None if gradient is None else module.row_major(gradient)[span],
                None,
                scoring.generator("drop"),
            )
        )

        def choose(count: int, excluded: Tensor) -> Tensor:
            if sampler is not None:
                return sampler.sample(layer.weights, excluded, count, scoring.generator("grow"))
            return module.grow_candidates(
                count, exclude=excluded, reduce=self._reduce, key=tie_key(ties), within=layer.rows
            )

        return rewire(
            active,
            ranking,
            layer.weights,
            update.drop,
            update.grow,
            choose,
            regrow_dropped=update.regrow_dropped,
            generator=ties,
            sets=engine(),
        )

    def _reduce(self, tensor: Tensor) -> None:
        average_(tensor, self._group)

    def apply(self, layer: SparseLayer, rewiring: Rewiring, optimizer: Optimizer) -> None:
        """See ``Storage``."""
        name, module = layer.parameter, self._modules[layer.parameter]
        gradient = module.values.grad
        grown, dropped = rewiring.grown + layer.offset, rewiring.dropped + layer.offset
        source = module.rewire(grown, dropped)
        for _, state in per_weight_state(optimizer, module.values):
            state.copy_(remap(state, source))
        if gradient is not None:
            collected = module.collected_gradient()
            self._reduce(collected)
            module.values.grad = remap(gradient, source, collected)
        if self._explored:
            self._explored[name].add(grown)
        for average in self._averages:
            average[name].rewire(grown, dropped)

    def expect_dense_gradient(self, parameters: Collection[nn.Parameter], expected: bool) -> None:
        """See ``Storage``."""
        for module in self._of(parameters):
            module.collect_dense_gradient(expected)

    def _of(self, parameters: Collection[nn.Parameter]) -> list[SparseLinear]:
        chosen = set(parameters)
        return [module for module in self._modules.values() if module.values in chosen]

    def collected_is_finite(self, parameters: Collection[nn.Parameter]) -> bool:
        """See ``Storage``."""
        return all(is_finite(t) for module in self._of(parameters) for pair in module.collected for t in pair)

    def collected_state(self) -> dict[str, list[list[Tensor]]]:
        """See ``Storage``."""
        held = {name: [[x.clone(), g.clone()] for x, g in m.collected] for name, m in self._modules.items()}
        return {name: pairs for name, pairs in held.items() if pairs}

    def load_collected(self, collected: Mapping[str, list[list[Tensor]]]) -> None:
        """See ``Storage``."""
        for name in (n for n in self._modules if n in collected):
            self._modules[name].restore_collected([(x.clone(), g.clone()) for x, g in collected[name]])

    def track_average(self, model: nn.Module) -> None:
        """See ``Storage``."""
        found = sparse_modules(model)
        if missing := sorted(set(self._modules) - set(found)):
            raise ConfigurationError(
                f"the averaged model has no sparse {', '.join(missing)}: copy the model after dst.prepare (in Lightning, "
                "list SparseTraining before the callback that averages)"
            )
        average = {name: found[name] for name in self._modules}
        if not any(known[n] is m for known in self._averages for n, m in list(average.items())[:1]):
            self._averages.append(average)
        self._match_averages()

    def _match_averages(self) -> None:
        for average in self._averages:
            for name, module in self._modules.items():
                if not torch.equal(average[name].positions(), module.positions()):
                    average[name].set_pattern(module.positions())

    def explore(self) -> None:
        """See ``Storage``."""
        for name, module in self._modules.items():
            self._explored[name] = Explored(module.in_features * module.out_features, module.shape[-1])
            self._explored[name].add(module.positions())

    def explored(self, layer: SparseLayer) -> float:
        """See ``Storage``."""
        explored = self._explored.get(layer.parameter)
        if explored is None:
            return self.active[layer.label]
        return explored.count() if layer.rows is None else explored.count(layer.offset, layer.offset + layer.weights)

    def signatures(self) -> Iterable[tuple[str, Tensor]]:
        """See ``Storage``."""
        return ((name, module.positions()) for name, module in sorted(self._modules.items()))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """See ``Storage``. Masks are sorted positions, in 32 bits if they fit; the union is one bit per position."""
        masks = {name: narrow(m.positions(), m.in_features * m.out_features) for name, m in self._modules.items()}
        return {"masks": masks, "union": {n: x.bits.clone() for n, x in self._explored.items()}, "latent": {}}

    def load(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """See ``Storage``."""
        masks, union = state["masks"], state["union"]
        for name, module in self._modules.items():
            positions = as_positions(masks[name])
            # If the model was loaded first it has these positions already, and keeps its values.
            if not torch.equal(positions, module.positions()):
                module.set_pattern(positions)
        self.active = self._counts()
        self._explored = {}
        for name in (n for n in self._modules if n in union):
            self._explored[name] = union_as_bits(union[name], self.shape(name))
        self._match_averages()
