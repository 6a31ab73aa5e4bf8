"""A linear layer that stores, trains and saves only its non-zero weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from dst.errors import ConfigurationError
from dst.kernels import Engine, Kernels, Pattern, engine
from dst.kernels.native import ChainLayer, Plan
from dst.topology.rewiring import without
from dst.topology.selection import random_indices

_COMPUTED = (torch.float32, torch.float64)

# Fast in evaluation, where calls cost more than arithmetic; torch has no public form of the second that is.
is_grad_enabled = torch.is_grad_enabled
is_autocast: Callable[[], bool] = getattr(
    torch._C, "_is_any_autocast_enabled", lambda: torch.is_autocast_enabled("cpu")
)


class RowKey:
    """Which values a copy by rows was made from.

    Attributes:
        source: an alias of the values, which keeps their address from being used for others.
        address: where they were.
        version: autograd's version of them.
        valid: whether the copy still holds them, as far as the layer was told.
    """

    __slots__ = ("address", "source", "valid", "version")

    def __init__(self, values: Tensor):
        self.source, self.address, self.version, self.valid = values.detach(), values.data_ptr(), values._version, True


# Parameters of a module, the name of one, its address or None, and the key of the copy that was made of it if any.
Watched: TypeAlias = tuple[Mapping[str, Tensor | None], str, int | None, RowKey | None]


def watch(module: nn.Module, name: str, key: RowKey | None = None) -> Watched:
    """Note where a parameter is, for `unchanged`; with ``key`` also what a copy was made from."""
    held = module._parameters[name]
    return module._parameters, name, None if held is None else held.data_ptr(), key


def unchanged(watched: Iterable[Watched]) -> bool:
    """Whether all parameters are where they were, and those that were copied are as they were."""
    for parameters, name, address, key in watched:
        held = parameters[name]
        if held is None or address is None:
            if held is not address:
                return False
        elif held.data_ptr() != address or (key is not None and not (key.valid and held._version == key.version)):
            return False
    return True


_TILE_ROWS = 256


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: SparseLinear) -> Tensor:
        kernels, pattern = layer._engine, layer._pattern
        xt = kernels.feature_major(x)
        values = values.contiguous()
        y = kernels.forward(pattern, layer._row_ordered(values, fresh=True), xt, bias, layer.relu)
        ctx.save_for_backward(xt, values, y if layer.relu else None)
        ctx.layer, ctx.pattern, ctx.has_bias = layer, pattern, bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        xt, values, y = ctx.saved_tensors
        layer = ctx.layer
        gx, gv, gb, gt = layer._engine.backward(
            ctx.pattern, values, xt, grads[0], y, input=ctx.needs_input_grad[0],
            bias=ctx.has_bias and ctx.needs_input_grad[2],
        )  # fmt: skip
        if layer._stash is not None:
            layer._stash.append((xt.detach(), gt.detach()))
        return gx, gv, gb, None


class SparseLinear(nn.Module):
    """``y = x Wᵀ + b`` where only the non-zeros of ``W`` exist.

    The values are kept by columns (first by column, then by row): that is the order of `values`, of its gradient and
    of the optimizer's state. A copy by rows, refreshed in every training step, serves the forward pass. A non-zero
    costs at most 28 bytes with its gradient and one momentum (24 where both sides are at most 65,536); row and
    column pointers come to 4 bytes a row and a column.

    Outputs are ``[batch, out]`` tensors whose storage is feature-major, so element-wise operations and further
    sparse layers never copy them.

    In evaluation the copy by rows follows `values` by autograd's version counter and is renewed on `train` and
    `eval`. Code that writes through ``values.data`` within one stretch of evaluation calls `refresh` afterwards.

    Args:
        in_features: size of an input.
        out_features: size of an output.
        indices: row-major flat positions ``row * in_features + column`` of the non-zeros: int64, sorted, distinct.
        values: their values, in the order of ``indices``; if None they are drawn as `reset_parameters` says.
        bias: whether to add a bias.
        relu: whether to apply ReLU to the output, in the same pass.
        dtype: float32, float64, or a 16-bit type (computed in float32); that of ``values`` or torch's default if None.
        generator: source of the random values.

    Attributes:
        pattern_seed: the seed that the first pattern was drawn with, where `dst.prepare` drew it at random.

    Shape:
        - Input: ``(*, in_features)``.
        - Output: ``(*, out_features)``.

    Raises:
        ConfigurationError: indices out of range, unsorted or repeated; values of another length; too many non-zeros.
    """

    values: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        indices: Tensor,
        values: Tensor | None = None,
        *,
        bias: bool = True,
        relu: bool = False,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self._relu = in_features, out_features, relu
        dtype = dtype or (torch.get_default_dtype() if values is None else values.dtype)
        if not dtype.is_floating_point:
            raise ConfigurationError(f"dtype={dtype}: weights are floating-point numbers")
        self._engine: Engine = engine()
        self._pattern = self._new_pattern(indices)
        self._row_values: Tensor | None = None
        self._row_key: RowKey | None = None
        self._plan: Plan | None = None
        self._watched: tuple[Watched, ...] = ()
        self._stash: list[tuple[Tensor, Tensor]] | None = None
        self._stashed = 0
        self._stash_hook: RemovableHandle | None = None
        self.pattern_seed: int | None = None
        self.values = nn.Parameter(torch.empty(self.nnz, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters(generator)
        if values is not None:
            if values.shape != (self.nnz,):
                raise ConfigurationError(f"values has shape {tuple(values.shape)}, the indices ask for ({self.nnz},)")
            with torch.no_grad():
                self.values[self._pattern.permutation.to(torch.int64)] = values.to(dtype)

    # ------------------------------------------------------------------------------------------ construction
    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor, *, relu: bool = False) -> SparseLinear:
        """Keep the weights of ``linear`` where ``mask`` is true, with their values, and its bias.

        Args:
            linear: a dense layer on the CPU; left as it is.
            mask: bool ``[out_features, in_features]``.
            relu: apply ReLU to the output as well.
        """
        weight = linear.weight.detach()
        if mask.shape != weight.shape or mask.dtype != torch.bool:
            raise ConfigurationError(
                f"mask is {mask.dtype} {tuple(mask.shape)}; a bool mask of shape {tuple(weight.shape)} is needed"
            )
        indices = mask.reshape(-1).nonzero().squeeze(1)
        layer = cls(
            linear.in_features, linear.out_features, indices, weight.reshape(-1)[indices],
            bias=linear.bias is not None, relu=relu,
        )  # fmt: skip
        layer.values.requires_grad_(linear.weight.requires_grad)
        if layer.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(linear.bias)
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    @classmethod
    def random(
        cls,
        in_features: int,
        out_features: int,
        nnz: int,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> SparseLinear:
        """Draw exactly ``nnz`` positions uniformly, without ever holding the dense matrix when few are wanted.

        Args:
            in_features: size of an input.
            out_features: size of an output.
            nnz: number of non-zeros, 0 to ``in_features * out_features``.
            generator: source of positions and values.
            **options: passed to the constructor.
        """
        indices = random_indices(in_features * out_features, nnz, generator)
        return cls(in_features, out_features, indices, generator=generator, **options)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw values and bias uniformly within ``1/sqrt(f)``, f the mean number of inputs an output has.

        It is the bound of ``nn.Linear`` with the fan-in of the sparse layer.
        """
        bound = 1 / math.sqrt(max(1.0, self.nnz / max(1, self.out_features)))
        with torch.no_grad():
            self.values.uniform_(-bound, bound, generator=generator)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound, generator=generator)

    def _new_pattern(self, indices: Tensor) -> Pattern:
        size = self.in_features * self.out_features
        if indices.dtype != torch.int64 or indices.dim() != 1:
            raise ConfigurationError(f"indices is {indices.dtype} {tuple(indices.shape)}; a 1-D int64 tensor is needed")
        if indices.numel() >= 1 << 31 or max(self.in_features, self.out_features) >= (1 << 31) - 1:
            raise ConfigurationError(f"a layer with {indices.numel()} non-zeros exceeds 32-bit positions; split it")
        if indices.numel():
            if int(indices[0]) < 0 or int(indices[-1]) >= size:
                raise ConfigurationError(
                    f"indices reach from {int(indices[0])} to {int(indices[-1])}; "
                    f"a {self.out_features}x{self.in_features} layer has positions 0 to {size - 1}"
                )
            if not bool((indices[1:] > indices[:-1]).all()):
                raise ConfigurationError("indices are not strictly increasing; pass indices.unique()")
        return self._engine.pattern(indices.contiguous(), self.out_features, self.in_features)

    # ------------------------------------------------------------------------------------------ views of the weight
    @property
    def nnz(self) -> int:
        """Number of non-zeros."""
        return self._pattern.nnz

    @property
    def pattern(self) -> Pattern:
        """Where the non-zeros are; immutable, replaced by `set_pattern`."""
        return self._pattern

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(out_features, in_features)`` of the weight that this layer stands for."""
        return self.out_features, self.in_features

    def mask(self) -> Tensor:
        """Return the bool mask ``[out_features, in_features]``."""
        return self._pattern.mask()

    def to_dense(self, entries: Tensor) -> Tensor:
        """Spread one entry per position (values, their gradient, optimizer state) over ``[out, in]``, zeros elsewhere."""
        dense = torch.zeros(self.out_features * self.in_features, dtype=entries.dtype)
        dense[self._pattern.flat_by_position()] = entries.detach()
        return dense.view(self.out_features, self.in_features)

    def from_dense(self, dense: Tensor) -> Tensor:
        """Collect the entries of a dense ``[out, in]`` tensor at the non-zeros, ``[nnz]`` in the order of `values`."""
        return dense.detach().reshape(-1)[self._pattern.flat_by_position()]

    def dense_weight(self) -> Tensor:
        """Return the weight as a dense ``[out_features, in_features]`` tensor, detached."""
        return self.to_dense(self.values)

    def to_linear(self) -> nn.Linear:
        """Return an ``nn.Linear`` with the same weights and bias; a fused ReLU is not part of it."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, dtype=self.values.dtype)
        with torch.no_grad():
            linear.weight.copy_(self.dense_weight())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Describe the layer in its printed form."""
        size = max(1, self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, nnz={self.nnz}, "
            f"density={self.nnz / size:.4g}, bias={self.bias is not None}, relu={self.relu}, engine={self._engine.name}"
        )

    # ------------------------------------------------------------------------------------------ computing
    def refresh(self) -> None:
        """Forget the copy by rows; only needed after writing through ``values.data`` during evaluation."""
        if self._row_key is not None:
            self._row_key.valid = False
        self._row_key = self._plan = None

    @property
    def relu(self) -> bool:
        """Whether ReLU is applied to the output."""
        return self._relu

    @relu.setter
    def relu(self, relu: bool) -> None:
        self.refresh()
        self._relu = relu

    def train(self, mode: bool = True) -> SparseLinear:
        """Switch between training and evaluation, as every module does."""
        self.refresh()
        return super().train(mode)

    def _row_ordered(self, values: Tensor, *, fresh: bool) -> Tensor:
        # `fresh`: weights change in every training step, and not all who change them leave a trace (`values.data`).
        # Weights made inside inference mode carry no version.
        fresh = fresh or values.is_inference()
        held = self._row_values
        if held is None or held.shape != values.shape or held.dtype != values.dtype:
            # Outside inference mode even if called inside it: training will write to this memory.
            with torch.inference_mode(False):
                held = torch.empty(values.shape, dtype=values.dtype)
            self._row_values = held
            self.refresh()
        key = self._row_key
        if fresh or key is None or (key.address, key.version) != (values.data_ptr(), values._version):
            self.refresh()
            self._engine.refresh(self._pattern, values, held)
            self._row_key = None if fresh else RowKey(values)
        return held

    def chain_layer(self) -> tuple[ChainLayer, RowKey] | None:
        """Prepare the layer for a `dst.kernels.native.Plan`.

        Returns:
            The plan's layer and what tells when it is outdated; None where the layer has to be computed by `forward`: in
            training, without compiled kernels, in 16-bit types, and for values or a bias that the kernels cannot read.
        """
        values, bias = self._parameters["values"], self._parameters["bias"]
        if self.training or not isinstance(self._engine, Kernels) or not readable(values, (self.nnz,)):
            return None
        # Values made inside inference mode carry no version to follow.
        if values is None or values.is_inference() or values.dtype not in _COMPUTED:
            return None
        if bias is not None and not (readable(bias, (self.out_features,)) and bias.dtype is values.dtype):
            return None
        rows = self._row_ordered(values.detach(), fresh=False)
        shift = None if bias is None else bias.detach()
        layer = ChainLayer(self.out_features, self.in_features, self._pattern, rows, shift, self.relu)
        return layer, cast(RowKey, self._row_key)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``(*, in_features)``."""
        plan = self._plan
        if plan is not None and not (is_grad_enabled() or is_autocast()) and unchanged(self._watched):
            planned = plan.run(x)
            if planned is not None:
                return planned
        if x.shape[-1] != self.in_features:
            raise ValueError(f"the last dimension of the input is {x.shape[-1]}; this layer takes {self.in_features}")
        values: Tensor = self.values
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled("cpu"):
            # Computed in the weights' own precision; only the type of the result follows autocast.
            wanted = torch.get_autocast_dtype("cpu")
            with torch.autocast("cpu", enabled=False):
                return self.forward(x.to(values.dtype)).to(wanted)
        wanted = x.dtype
        if x.dtype != values.dtype:
            raise ValueError(f"the input is {x.dtype}, this layer's weights are {values.dtype}")
        if x.device.type != "cpu" or values.device.type != "cpu":
            raise ConfigurationError(
                f"sparse layers compute on the CPU; the input is on {x.device}, the weights on {values.device}. "
                "Use the masked backend elsewhere"
            )
        if values.dtype not in _COMPUTED:
            values = values.float()
            bias = None if bias is None else bias.float()
        x = x.to(values.dtype)
        lead = x.shape[:-1]
        if x.dim() != 2:
            x = x.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and (
            values.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
        ):
            y = cast(Tensor, _Apply.apply(x, values, bias, self))
        else:
            y = self._evaluate(x.detach(), values.detach(), bias)
        if len(lead) != 1:
            y = y.view(*lead, self.out_features)
        return y if y.dtype == wanted else y.to(wanted)

    def _evaluate(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        # Converted values are new memory at every call: their version says nothing about the weights.
        converted = values.dtype is not self.values.dtype
        if self._plan is None or not unchanged(self._watched):
            prepared = None if converted else self.chain_layer()
            self._plan = None
            if prepared is not None:
                self._watched = watch(self, "values", prepared[1]), watch(self, "bias")
                self._plan = cast(Kernels, self._engine).plan([prepared[0]])
        y = None if self._plan is None else self._plan.run(x)
        if y is None:
            rows = self._row_ordered(values, fresh=self.training or converted)
            y = self._engine.forward(self._pattern, rows, self._engine.feature_major(x), bias, self.relu)
        return y

    # ------------------------------------------------------------------------------------------ topology
    def collect_dense_gradient(self, collect: bool = True) -> None:
        """Keep (or stop keeping and forget) the inputs and output gradients of coming backward passes.

        They stand for the dense gradient of the weight, summed over all backward passes since the call, or since the
        gradient of `values` was last set to None. Call it with True before the first micro-batch of a step that ends in
        growth by gradient, with False after it.
        """
        self._stash, self._stashed = [] if collect else None, 0
        if collect and self._stash_hook is None:
            self._stash_hook = self.values.register_hook(self._end_of_backward)
        elif not collect and self._stash_hook is not None:
            self._stash_hook.remove()
            self._stash_hook = None

    @property
    def collected(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Feature-major inputs and output gradients of the backward passes collected so far."""
        return self._stash or ()

    def restore_collected(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Go on from an earlier `collected`, if the gradient is being collected."""
        if self._stash is not None:
            self._stash, self._stashed = list(pairs), len(pairs)

    def _end_of_backward(self, gradient: Tensor) -> None:
        # Called once per backward pass, before `values.grad` takes it up: where that holds nothing, what was collected
        # earlier belongs to a gradient that was discarded.
        if self._stash is not None:
            if self.values.grad is None:
                del self._stash[: self._stashed]
            self._stashed = len(self._stash)

    def collected_gradient(self) -> Tensor:
        """Return the gradient collected, at the non-zeros of the present pattern: ``[nnz]``, in the order of `values`.

        After `rewire` that includes connections which did not exist in the backward pass.
        """
        total = torch.zeros_like(self.values.detach())
        for x, g in self.collected:
            values = self.values.detach().to(x.dtype).contiguous()
            total += self._engine.backward(self._pattern, values, x, g.t(), None, input=False, bias=False)[1]
        return total

    def gradient_tiles(self, rows: int = _TILE_ROWS) -> Any:
        """Yield ``(first row, tile)`` of the dense gradient collected, tile ``[<= rows, in_features]`` by tile.

        The micro-batches are summed in each tile. Every tile is the same memory. Without a backward pass it is zero.

        Raises:
            ConfigurationError: nothing is being collected.
        """
        if self._stash is None:
            raise ConfigurationError(
                "no gradient was collected: call collect_dense_gradient(True) before the forward and backward pass"
            )
        dtype = self.values.dtype if self.values.dtype in _COMPUTED else torch.float32
        buffer = torch.zeros(min(rows, self.out_features), self.in_features, dtype=dtype)
        for first in range(0, self.out_features, rows):
            last = min(first + rows, self.out_features)
            tile = buffer[: last - first]
            for i, (x, g) in enumerate(self._stash):
                torch.addmm(tile, g[first:last], x.t(), beta=float(i > 0), out=tile)
            yield first, tile

    def dense_gradient(self) -> Tensor:
        """Return the whole gradient collected, ``[out_features, in_features]``: for small layers."""
        return torch.cat([tile.clone() for _, tile in self.gradient_tiles()])

    def grow_candidates(
        self,
        k: int,
        *,
        exclude: Tensor | None = None,
        reduce: Callable[[Tensor], None] | None = None,
        key: int = 0,
    ) -> Tensor:
        """Return the k positions with the largest absolute gradient, without ever holding the dense gradient.

        The gradient is summed over the micro-batches before its absolute value is taken. Ties, those at zero too, are
        broken by `dst.topology.selection.tie_order`.

        Args:
            k: how many positions.
            exclude: sorted row-major flat indices that may not be chosen: those kept. All non-zeros if None.
            reduce: called on every tile, in the same order everywhere, to average it over processes in place.
            key: of ``tie_order``.

        Returns:
            Sorted row-major flat indices, int64 ``[k]``.

        Raises:
            ConfigurationError: fewer than k positions may be chosen, or nothing is being collected.
        """
        exclude = self._pattern.flat() if exclude is None else exclude.contiguous()
        edges = torch.arange(0, self.out_features + _TILE_ROWS, _TILE_ROWS).clamp_(max=self.out_features)
        cuts = torch.searchsorted(exclude, edges * self.in_features).tolist()
        free = self.in_features * self.out_features - exclude.numel()
        if k > free:
            raise ConfigurationError(f"cannot grow {k} connections: only {free} positions are not excluded")
        best = None
        with torch.no_grad():
            for i, (first, tile) in enumerate(self.gradient_tiles()):
                if reduce is not None:
                    reduce(tile)
                best = best or self._engine.top_k(k, tile.dtype, key)
                best.update(tile, first * self.in_features, exclude[cuts[i] : cuts[i + 1]])
        chosen = torch.empty(0, dtype=torch.int64) if best is None else best.finish()
        if chosen.numel() != k:
            raise ConfigurationError(f"cannot grow {k} connections: the gradient is NaN at all but {chosen.numel()}")
        return chosen

    def row_major(self, entries: Tensor) -> Tensor:
        """Bring entries, ``[nnz]`` in the order of `values`, into that of their flat indices."""
        return entries.detach()[self._pattern.permutation]

    def rewire(self, grown: Tensor, dropped: Tensor) -> Tensor:
        """Add and remove connections, both as sorted flat indices; see `set_pattern`."""
        return self.set_pattern(self._engine.merge(without(self._pattern.flat(), dropped), grown))

    def set_pattern(self, indices: Tensor) -> Tensor:
        """Change where the non-zeros are. Survivors keep their values, new ones are zero, the gradient is cleared.

        Args:
            indices: sorted distinct row-major flat indices, int64; their number may change.

        Returns:
            int64 ``[new nnz]``: for each new position its old position, or -1 where it is new. ``remap`` carries
            per-position state, such as an optimizer's, by it.
        """
        new = self._new_pattern(indices)
        source = self._engine.match(self._pattern, new)
        # Memory of the old row copy goes first: at the peak there is one copy less.
        self.refresh()
        self._row_values = None
        self._pattern = new
        self.values.grad = None
        self.values.data = remap(self.values.data, source)
        return source

    # ------------------------------------------------------------------------------------------ state
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # The pattern by columns is enough: the order by rows follows from it.
        destination[prefix + "column_pointers"] = self._pattern.column_pointers
        destination[prefix + "row_indices"] = self._pattern.row_indices.to(torch.int32)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [prefix + "column_pointers", prefix + "row_indices"]
        dense = state_dict.get(prefix + "weight")
        if dense is not None and prefix + "values" not in state_dict:
            if message := self._adopt(dense):
                error_msgs.append(f"{prefix}weight: {message}")
                return
            state_dict = {key: value for key, value in state_dict.items() if key != prefix + "weight"}
            state_dict[prefix + "values"], names = self.from_dense(dense), []
        absent = [name for name in names if name not in state_dict]
        if strict:
            missing_keys.extend(absent)
        if names and not absent:
            pointers, rows = (state_dict[name].to(torch.int64) for name in names)
            message = self._damage(pointers, rows)
            if message:
                error_msgs.append(f"{prefix}row_indices: {message}")
                return
            columns = torch.repeat_interleave(torch.arange(self.in_features), pointers.diff())
            self._pattern = self._new_pattern((rows * self.in_features + columns).sort().values)
            self.refresh()
            self._row_values = None
            if self.values.numel() != self.nnz:
                self.values.grad = None
                self.values.data = self.values.data.new_zeros(self.nnz)
        rest = {key: value for key, value in state_dict.items() if key not in names}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self.refresh()

    def _adopt(self, dense: Tensor) -> str | None:
        """Take over the positions of a masked weight's non-zeros, or say why that cannot be.

        A connection may hold a zero, which the weight does not tell from an inactive one: positions of the present
        pattern make up for the number. A sparsifier's state, loaded afterwards, sets them right.
        """
        if dense.shape != self.shape:
            return f"saved with shape {tuple(dense.shape)}, this layer stands for {tuple(self.shape)}"
        found = dense.detach().reshape(-1).nonzero().squeeze(1).cpu()
        spare = self.nnz - found.numel()
        if spare < 0:
            return (
                f"saved with {found.numel()} non-zeros, this layer holds {self.nnz}; load weights of a dense model before "
                "dst.prepare"
            )
        present = self._pattern.flat()
        unused = present[~torch.isin(present, found)][:spare]
        self._pattern = self._new_pattern(torch.cat([found, unused]).sort().values)
        self._row_values = self._row_key = self._plan = None
        return None

    def _damage(self, pointers: Tensor, rows: Tensor) -> str | None:
        """Say what is wrong with a saved pattern, or None."""
        if pointers.shape != (self.in_features + 1,):
            return f"saved for {pointers.numel() - 1} inputs, this layer has {self.in_features}"
        counts = pointers.diff()
        if int(pointers[0]) != 0 or bool((counts < 0).any()) or int(pointers[-1]) != rows.numel():
            return "the saved column pointers are damaged"
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < self.out_features:
            return f"saved rows reach {int(rows.max())}, this layer has {self.out_features} outputs"
        columns = torch.repeat_interleave(torch.arange(self.in_features), counts)
        by_column = columns * self.out_features + rows
        if not bool((by_column.diff() > 0).all()):
            return "the saved row indices are not sorted within their columns"
        return None

    def state_bytes(self) -> int:
        """Bytes of values, both orders and all indices; gradient and optimizer state come on top."""
        return 2 * self.values.numel() * self.values.element_size() + self._pattern.nbytes

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseLinear:
        import copy

        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        # The pattern is immutable and the engine is the process's: both are shared. The copy by rows is made anew.
        shared = {"_pattern", "_engine"}
        fresh = {
            "_row_values": None, "_row_key": None, "_plan": None, "_watched": (), "_stash": None, "_stash_hook": None,
        }  # fmt: skip
        for key, value in self.__dict__.items():
            new.__dict__[key] = fresh[key] if key in fresh else value if key in shared else copy.deepcopy(value, memo)
        return new

    def __getstate__(self) -> dict[str, Any]:
        derived = dict.fromkeys(("_engine", "_row_values", "_row_key", "_plan", "_stash", "_stash_hook"))
        # Flat indices travel: pickle knows no 16-bit unsigned tensors, and another machine may have another engine.
        return {**self.__dict__, **derived, "_watched": (), "_pattern": self._pattern.flat()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._engine = engine()
        self._pattern = self._new_pattern(state["_pattern"])


class FeatureMajorLinear(nn.Linear):
    """A dense ``nn.Linear`` that computes feature-major, for the dense head after sparse layers.

    Same parameters, state_dict and results as ``nn.Linear``; input and its gradient keep the feature-major storage
    that sparse layers use, so neither is transposed.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> FeatureMajorLinear:
        """Take over the parameters (the same objects) of ``linear``."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.__dict__.update(linear.__dict__)
        return new

    def to_linear(self) -> nn.Linear:
        """Return an ``nn.Linear`` with the same parameters (the same objects)."""
        new = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(new)
        new.__dict__.update(self.__dict__)
        return new

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``(*, in_features)``."""
        if x.dim() != 2 or x.stride(0) != 1 or x.shape[0] < 2:
            return super().forward(x)
        if self.bias is None:
            return torch.mm(self.weight, x.t()).t()
        return torch.addmm(self.bias.unsqueeze(1), self.weight, x.t()).t()


def readable(tensor: Tensor | None, shape: tuple[int, ...]) -> bool:
    """Whether the kernels can read ``tensor`` where it is, as a contiguous one of this shape."""
    return type(tensor) in (Tensor, nn.Parameter) and bool(
        tensor is not None and tensor.is_cpu and tensor.shape == shape and tensor.is_contiguous()
    )


def remap(entries: Tensor, source: Tensor) -> Tensor:
    """Carry per-position entries over a change of pattern.

    Args:
        entries: ``[old nnz]`` values, gradient or optimizer state.
        source: what `SparseLinear.set_pattern` returned, ``[new nnz]``.

    Returns:
        ``[new nnz]``: the survivors' entries, zero for the grown.
    """
    if entries.numel() == 0:
        return entries.new_zeros(source.numel())
    return torch.where(source >= 0, entries[source.clamp(min=0)], torch.zeros((), dtype=entries.dtype))
