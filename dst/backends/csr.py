"""Storage of non-zeros alone: ``nn.Linear`` becomes ``dst.nn.SparseLinear``, a 1×1 convolution ``SparseConv2d``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.optim import Optimizer

from dst.backends.explored import Explored
from dst.backends.saved import as_positions, narrow, union_as_bits
from dst.backends.storage import Draft, Storage, is_finite
from dst.engine.first_mask import first_positions
from dst.errors import ConfigurationError, StateError
from dst.method import Method
from dst.nn import FeatureMajorLinear, SparseConv2d, SparseLinear, remap
from dst.pieces.init import FromFile
from dst.pieces.protocols import LayerView, as_sampler
from dst.topology.layers import SparseLayer, find_layers, sparse_modules
from dst.topology.mask_file import load_masks
from dst.topology.optimizer_state import per_weight_state
from dst.topology.rewiring import Rewiring, rewire
from dst.topology.seeding import folded_generator
from dst.topology.selection import tie_key
from dst.topology.sharding import all_agree, average_

Dense: TypeAlias = nn.Linear | nn.Conv2d
"""Modules that may become sparse ones."""

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SPARSE = (SparseLinear.__name__, SparseConv2d.__name__)
_HOOKS = tuple(name for name in nn.Linear(1, 1).__dict__ if name.endswith("_hooks") and "state_dict" not in name)


class Csr(Storage):
    """Storage in ``SparseLinear`` modules; see ``dst.backends.storage.Storage``.

    Args:
        modules: Name of the dense weight to module.
        layers: The layers that they are.
        group: The processes that train together.
    """

    backend = "csr"
    is_placed = True

    def __init__(
        self, modules: Mapping[str, SparseLinear], layers: Sequence[SparseLayer], group: ProcessGroup | None = None
    ) -> None:
        self._modules, self._layers, self._group = dict(modules), list(layers), group
        self.parameters: Mapping[str, nn.Parameter] = {name: module.values for name, module in modules.items()}
        for name, values in self.parameters.items():
            if type(values) is not nn.Parameter or values.device.type != "cpu":
                raise ConfigurationError(
                    f"the non-zeros of {name} are {type(values).__name__} on {values.device}; the csr backend computes on "
                    'the CPU and with whole layers: train there, or use backend="masked"'
                )
        self.active = {layer.label: modules[layer.parameter].nnz for layer in layers}
        self._explored: dict[str, Explored] = {}
        self._averages: list[dict[str, SparseLinear]] = []

    def masks(self) -> dict[str, Tensor]:
        """See ``Storage``; built anew at every call."""
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
        return LayerView(module.dense_weight(), module.mask(), None, None, generator)

    def rescale(self, layer: SparseLayer) -> None:
        """See ``Storage``."""
        module = self._modules[layer.parameter]
        counts = module.pattern.row_pointers.diff()
        scale = (module.in_features / counts.clamp(min=1)).sqrt().to(module.values.dtype)
        module.values.detach().mul_(scale[module.pattern.row_indices.to(torch.int64)])

    def decide(self, layer: SparseLayer, draft: Draft) -> Rewiring | None:
        """See ``Storage``; scores see the active connections alone, as vectors in the order of their positions."""
        module = self._modules[layer.parameter]
        drop, grow, ties = draft.scores["drop"], draft.scores["grow"], draft.generator("ties")
        sampler = as_sampler(grow)
        gradient = module.values.grad if drop.needs_gradient else None
        if drop.needs_gradient and gradient is None:
            return None
        # All processes take the same way here: each tile of the gradient is reduced over them.
        if grow.needs_gradient and all_agree(not module.collected, self._group):
            return None
        active, weight = module.pattern.flat(), module.row_major(module.values)
        ranking = drop(
            LayerView(
                weight,
                torch.ones_like(weight, dtype=torch.bool),
                None if gradient is None else module.row_major(gradient),
                None,
                draft.generator("drop"),
            )
        )

        def choose(count: int, barred: Tensor) -> Tensor:
            if sampler is not None:
                return sampler.sample(layer.weights, barred, count, draft.generator("grow"))
            return module.grow_candidates(count, exclude=barred, reduce=self._reduce, key=tie_key(ties))

        return rewire(
            active,
            ranking,
            layer.weights,
            draft.drop,
            draft.grow,
            choose,
            regrow_dropped=draft.regrow_dropped,
            generator=ties,
        )

    def _reduce(self, tensor: Tensor) -> None:
        average_(tensor, self._group)

    def apply(self, layer: SparseLayer, rewiring: Rewiring, optimizer: Optimizer) -> None:
        """See ``Storage``."""
        name, module = layer.parameter, self._modules[layer.parameter]
        gradient = module.values.grad
        source = module.rewire(rewiring.grown, rewiring.dropped)
        for _, state in per_weight_state(optimizer, module.values):
            state.copy_(remap(state, source))
        if gradient is not None:
            anew = module.collected_gradient()
            self._reduce(anew)
            module.values.grad = torch.where(source >= 0, gradient[source.clamp(min=0)], anew)
        if self._explored:
            self._explored[name].add(rewiring.grown)
        for average in self._averages:
            average[name].rewire(rewiring.grown, rewiring.dropped)

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
                if not torch.equal(average[name].pattern.flat(), module.pattern.flat()):
                    average[name].set_pattern(module.pattern.flat())

    def explore(self) -> None:
        """See ``Storage``."""
        for name, module in self._modules.items():
            self._explored[name] = Explored(module.in_features * module.out_features, module.in_features)
            self._explored[name].add(module.pattern.flat())

    def explored(self, layer: SparseLayer) -> float:
        """See ``Storage``."""
        explored = self._explored.get(layer.parameter)
        return self.active[layer.label] if explored is None else explored.count()

    def signatures(self) -> Iterable[tuple[str, Tensor]]:
        """See ``Storage``."""
        return [(name, module.pattern.flat()) for name, module in sorted(self._modules.items())]

    def masks_state(self) -> dict[str, Tensor]:
        """See ``Storage``: sorted positions, in 32 bits where they fit."""
        return {name: narrow(m.pattern.flat(), m.in_features * m.out_features) for name, m in self._modules.items()}

    def union_state(self) -> dict[str, Tensor]:
        """See ``Storage``: one bit a position."""
        return {name: explored.bits.clone() for name, explored in self._explored.items()}

    def load(self, masks: Mapping[str, Tensor], union: Mapping[str, Tensor]) -> None:
        """See ``Storage``."""
        for name, module in self._modules.items():
            positions = as_positions(masks[name])
            # A model that was loaded before has these connections, and its values stay as they are.
            if not torch.equal(positions, module.pattern.flat()):
                module.set_pattern(positions)
        self.active = {layer.label: self._modules[layer.parameter].nnz for layer in self._layers}
        self._explored = {}
        for name in (n for n in self._modules if n in union):
            self._explored[name] = union_as_bits(union[name], self.shape(name))
        self._match_averages()


# -- which layers, and how they come about --------------------------------------------------------------------------


def obstacles(model: nn.Module, layers: Sequence[SparseLayer]) -> dict[str, str | None]:
    """Why layers cannot be stored as non-zeros.

    Args:
        model: The model.
        layers: Its sparse layers.

    Returns:
        Layer label to the reason, ``None`` where there is none.
    """
    owners, named = _owners(model), dict(model.named_parameters())
    fused = {id(child) for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer) for child in m.children()}
    return {
        layer.label: None
        if layer.kind in _SPARSE
        else _obstacle(layer, named[layer.parameter], owners[layer.parameter], fused)
        for layer in layers
    }


def _obstacle(layer: SparseLayer, weight: Tensor, owners: Sequence[nn.Module], fused: Collection[int]) -> str | None:
    """Why a dense layer cannot be stored as non-zeros, or ``None``."""
    first = owners[0]
    if any(isinstance(m, (nn.MultiheadAttention, NonDynamicallyQuantizableLinear)) for m in owners):
        return "MultiheadAttention reads the weight itself; q, k, v and output as nn.Linear would be csr"
    if not all(is_servable(m) for m in owners) or layer.parameter.rpartition(".")[2] != "weight":
        if isinstance(first, nn.Conv2d):
            size = "×".join(map(str, first.kernel_size))
            if size == "1×1":
                return f"{'grouped' if first.groups > 1 else 'padded'} 1×1 convolution has no csr kernel"
            return f"{size} convolution: unfolded, not reliably faster than dense (docs/benchmarks.md)"
        return f"{layer.kind} has no csr kernel"
    if len({id(module) for module in owners}) > 1:
        return "tied weights"
    if id(first) in fused:
        return "TransformerEncoderLayer reads the weight itself"
    if weight.device.type not in ("cpu", "meta"):
        return f"on {weight.device.type}; csr computes on the CPU"
    if weight.dtype not in _DTYPES:
        return f"dtype {weight.dtype}"
    return None


def is_servable(module: nn.Module) -> bool:
    """Whether a dense module is of a kind that has a sparse one: a linear layer, a plain 1×1 convolution."""
    if type(module) is nn.Conv2d:
        padded = module.padding not in ((0, 0), "valid", "same")
        return module.kernel_size == (1, 1) and module.groups == 1 and not padded
    # Subclasses may read their weight in ways of their own.
    return type(module) in (nn.Linear, FeatureMajorLinear)


def _owners(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Parameter name to the modules that hold it."""
    names = {id(p): name for name, p in model.named_parameters()}
    owners: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        for _, parameter in module.named_parameters(recurse=False):
            owners.setdefault(names[id(parameter)], []).append(module)
    return owners


def prepare(
    model: nn.Module,
    method: Method,
    *,
    seed: int,
    include: Iterable[str | type[nn.Module]] | None,
    exclude: Iterable[str | type[nn.Module]] | None,
    choose: Callable[[SparseLayer, Dense, int], bool] = lambda layer, module, active: True,
    keep: Callable[[SparseLayer, str, str], None] = lambda layer, storage, reason: None,
) -> nn.Module:
    """Swap layers for sparse ones with their first connections; see ``dst.prepare``.

    Args:
        model: As there.
        method: As there.
        seed: As there.
        include: As there.
        exclude: As there.
        choose: Asked for every layer that could be swapped, with its dense module and number of connections.
        keep: Told of every other sparse layer: ``"masked"`` or ``"dense"``, and why.
    """
    if any(m.pattern_seed is not None for m in model.modules() if isinstance(m, SparseLinear)):
        return model  # prepared before; layers that stayed dense then stay so
    layers, _ = find_layers(model, include, exclude)
    owners, modules = _owners(model), sparse_modules(model)
    barred = obstacles(model, layers)
    swapped: dict[nn.Module, nn.Module] = {}
    for layer, positions in _first(model, layers, method, seed, modules):
        if positions is None:
            continue
        if positions.numel() == layer.weights:
            keep(layer, "dense", "keeps all its weights")
            continue
        if (reason := barred[layer.label]) is not None:
            keep(layer, "masked", reason)
            continue
        dense = owners[layer.parameter][0]
        assert isinstance(dense, (nn.Linear, nn.Conv2d))
        if choose(layer, dense, positions.numel()):
            swapped[dense] = sparse_module(layer.label, dense, positions, seed)
    return exchange(model, swapped)


def exchange(model: nn.Module, swapped: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put modules in the places of others, and make the dense linear layers beside sparse ones feature-major.

    Args:
        model: Changed in place.
        swapped: Old module to new one.

    Returns:
        The model: a new one where it is itself among the old.
    """
    if not swapped:
        return model
    model = replace(model, swapped)
    modules = list(model.modules())
    beside: dict[nn.Module, nn.Module] = {}
    if any(isinstance(module, SparseLinear) for module in modules):
        # Dense layers take activations as sparse ones leave them.
        beside = {m: FeatureMajorLinear.from_linear(m) for m in modules if type(m) is nn.Linear}
    else:
        beside = {m: m.to_linear() for m in modules if type(m) is FeatureMajorLinear}
    _guard_save_pretrained(model, any(isinstance(module, SparseLinear) for module in modules))
    return replace(model, beside)


def _guard_save_pretrained(model: nn.Module, stores_non_zeros: bool) -> None:
    """Let a Hugging Face model refuse to write a file that ``from_pretrained`` would fill up with random weights."""
    if not hasattr(type(model), "save_pretrained"):
        return
    if stores_non_zeros:
        model.__dict__["save_pretrained"] = _refuse_to_save
    else:
        model.__dict__.pop("save_pretrained", None)


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise ConfigurationError(
        "this model stores only its non-zeros, under names that from_pretrained does not know: turn it back by "
        "dst.to_dense(model) first, or save a copy that was"
    )


def replace(model: nn.Module, swapped: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put modules in the places of others, wherever they stand; see ``exchange``."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and child in swapped:
                module._modules[name] = swapped[child]
    return swapped.get(model, model)


def _first(
    model: nn.Module,
    layers: Sequence[SparseLayer],
    method: Method,
    seed: int,
    modules: Mapping[str, SparseLinear],
) -> Iterable[tuple[SparseLayer, Tensor | None]]:
    """Layers and their first positions, ``None`` for those that are sparse modules already."""
    if isinstance(method.init, FromFile):
        masks, named = load_masks(method.init.path), dict(model.named_parameters())
        for layer in layers:
            shape = layer.shape if layer.parameter in modules else tuple(named[layer.parameter].shape)
            if layer.parameter not in masks or masks[layer.parameter].shape != shape:
                raise StateError(f"the mask file {method.init.path} has no {layer.parameter} of shape {shape}")
            yield layer, None if layer.parameter in modules else as_positions(layer.part(masks[layer.parameter]))
        return
    named = dict(model.named_parameters())

    def view(layer: SparseLayer, generator: torch.Generator) -> LayerView:
        if layer.parameter in modules:
            weight = modules[layer.parameter].dense_weight()
        elif named[layer.parameter].device.type == "meta":
            raise ConfigurationError(
                f"{layer.parameter} is on the meta device, and {type(method.init).__name__} with this allocation needs its "
                "values: give it storage first, or draw the first connections at random by ERK"
            )
        else:
            weight = layer.part(named[layer.parameter].detach())
        return LayerView(weight, torch.ones_like(weight, dtype=torch.bool), None, None, generator)

    placed = [layer.label for layer in layers if layer.parameter in modules]
    for layer, _, positions in first_positions(method, layers, view, seed=seed, placed=placed):
        yield layer, positions


def sparse_module(label: str, dense: nn.Module, positions: Tensor, seed: int) -> SparseLinear:
    """Make a sparse layer of some weights of a dense one, which is left as it is.

    Args:
        label: The layer's name, of which values are drawn where the dense weight is on the meta device.
        dense: One that ``is_servable``.
        positions: Sorted row-major positions of the weights.
        seed: Kept as ``pattern_seed``.
    """
    assert isinstance(dense, (nn.Linear, nn.Conv2d))
    weight, bias, on_meta = dense.weight, dense.bias, dense.weight.device.type == "meta"
    values = None if on_meta else weight.detach().reshape(-1)[positions]
    options: dict[str, Any] = {
        "bias": bias is not None,
        "dtype": weight.dtype,
        "generator": folded_generator(seed, "values", label),
    }
    outputs, inputs = weight.shape[:2]
    if isinstance(dense, nn.Conv2d):
        down, across = dense.stride
        sparse: SparseLinear = SparseConv2d(inputs, outputs, positions, values, stride=(down, across), **options)
    else:
        sparse = SparseLinear(inputs, outputs, positions, values, **options)
    if bias is not None and sparse.bias is not None:
        if not on_meta:
            sparse.bias.detach().copy_(bias.detach())
        sparse.bias.requires_grad_(bias.requires_grad)
    for name in _HOOKS:
        sparse.__dict__[name] = dense.__dict__[name]
    sparse.pattern_seed = seed
    return sparse.train(dense.training)


def dense_module(sparse: SparseLinear) -> Dense:
    """Make a dense layer with the weights and hooks of a sparse one, zeros elsewhere."""
    dense = sparse.to_conv() if isinstance(sparse, SparseConv2d) else sparse.to_linear()
    dense.weight.requires_grad_(sparse.values.requires_grad)
    if dense.bias is not None and sparse.bias is not None:
        dense.bias.requires_grad_(sparse.bias.requires_grad)
    for name in _HOOKS:
        dense.__dict__[name] = sparse.__dict__[name]
    return dense
