"""A linear layer that stores, trains and saves only its non-zero weights: one public class with its documentation.

What it keeps is owned elsewhere: `dst.nn.row_copy`, `dst.nn.gradient_collector`, `dst.nn.saved_pattern`, `dst.nn.watched`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dst.errors import ConfigurationError
from dst.kernels import ChainLayer, Engine, Kernels, Pattern, engine
from dst.kernels.pattern import check_flat

# FeatureMajorLinear was defined here: pickled models name it by this module.
from dst.nn.feature_major import FeatureMajorLinear as FeatureMajorLinear
from dst.nn.gradient_collector import TILE_ROWS, GradientCollector, gradient_at, largest_gradients
from dst.nn.row_copy import RowCopy
from dst.nn.saved_pattern import NAMES, flat_of_masked, flat_of_saved, saved_pattern
from dst.nn.watched import CopyKey, WatchedChain, readable, unchanged, watch
from dst.topology.rewiring import without
from dst.topology.selection import random_indices

_COMPUTED = (torch.float32, torch.float64)

# Called at every evaluation, where calls cost more than arithmetic; torch has no public form of the second that is fast.
is_grad_enabled = torch.is_grad_enabled
is_autocast: Callable[[], bool] = getattr(
    torch._C, "_is_any_autocast_enabled", lambda: torch.is_autocast_enabled("cpu")
)


class _Apply(torch.autograd.Function):
    """``W x + bias``, then ReLU if the layer has it; the backward pass gives its pair to the layer's collector."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: SparseLinear) -> Tensor:
        kernels, pattern = layer._engine, layer._pattern
        xt = kernels.feature_major(x)
        values = values.contiguous()
        y = kernels.forward(pattern, layer._rows.of(values, pattern, kernels, fresh=True), xt, bias, layer.relu)
        ctx.save_for_backward(xt, values, y if layer.relu else None)
        ctx.kernels, ctx.pattern, ctx.collector, ctx.has_bias = kernels, pattern, layer._collector, bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        xt, values, y = ctx.saved_tensors
        gx, gv, gb, gt = ctx.kernels.backward(
            ctx.pattern, values, xt, grads[0], y, input=ctx.needs_input_grad[0],
            bias=ctx.has_bias and ctx.needs_input_grad[2],
        )  # fmt: skip
        ctx.collector.add(xt, gt)
        return gx, gv, gb, None


class SparseLinear(nn.Module):
    """``y = x Wᵀ + b`` where only the non-zeros of ``W`` exist.

    `values`, its gradient and the optimizer's state are in column order (by column, then by row). The forward pass reads a
    copy in row order, refreshed in every training step. A non-zero takes at most 28 bytes with its gradient and one
    momentum (24 if both sides are at most 65,536). Row and column pointers add 4 bytes per row and per column.

    Outputs are ``[batch, out]`` tensors whose storage is feature-major, so element-wise operations and further
    sparse layers never copy them.

    In evaluation the copy is renewed when autograd's version of `values` changes, and on `train` and `eval`. Code that
    writes through ``values.data`` in evaluation has to call `refresh` afterwards.

    Args:
        in_features: size of an input.
        out_features: size of an output.
        indices: row-major flat positions ``row * in_features + column`` of the non-zeros: int64, sorted, distinct.
        values: their values, in the order of ``indices``; None to draw them as `reset_parameters` does.
        bias: whether to add a bias.
        relu: whether to apply ReLU to the output, in the same pass.
        dtype: float32, float64, or a 16-bit type (computed in float32); that of ``values`` or torch's default if None.
        generator: source of the random values.

    Attributes:
        pattern_seed: Seed of the first pattern if `dst.prepare` drew it at random.

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
        self._rows, self._collector = RowCopy(), GradientCollector()
        self._chain: WatchedChain | None = None
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
        """Draw exactly ``nnz`` positions uniformly, without holding the dense matrix if they are few.

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

        This is the bound of ``nn.Linear`` for the fan-in of the sparse layer.
        """
        bound = 1 / math.sqrt(max(1.0, self.nnz / max(1, self.out_features)))
        with torch.no_grad():
            self.values.uniform_(-bound, bound, generator=generator)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound, generator=generator)

    def _new_pattern(self, indices: Tensor) -> Pattern:
        check_flat(indices, self.out_features, self.in_features)
        return self._engine.pattern(indices.contiguous(), self.out_features, self.in_features)

    # ------------------------------------------------------------------------------------------ views of the weight
    @property
    def nnz(self) -> int:
        """Number of non-zeros."""
        return self._pattern.nnz

    @property
    def pattern(self) -> Pattern:
        """Positions of the non-zeros; immutable, replaced by `set_pattern`."""
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
        """Renew the copy by rows at the next use; only needed after writing through ``values.data`` in evaluation."""
        self._rows.outdate()
        self._chain = None

    def _set_pattern(self, pattern: Pattern) -> None:
        # The old copy by rows is freed first: at the peak there is one copy less.
        self._chain = None
        self._rows.free()
        self._pattern = pattern

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

    def chain_layer(self) -> tuple[ChainLayer, CopyKey] | None:
        """Prepare the layer for a `dst.kernels.CompiledChain`.

        Returns:
            The layer, and the key that tells when it is outdated. None if only `forward` can compute the layer: in
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
        rows = self._rows.of(values.detach(), self._pattern, self._engine, fresh=False)
        shift = None if bias is None else bias.detach()
        layer = ChainLayer(self.out_features, self.in_features, self._pattern, rows, shift, self.relu)
        return layer, cast(CopyKey, self._rows.key)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``(*, in_features)``."""
        prepared = self._chain
        if prepared is not None and not (is_grad_enabled() or is_autocast()) and unchanged(prepared.watched):
            y = prepared.chain.run(x)
            if y is not None:
                return y
        if x.shape[-1] != self.in_features:
            raise ValueError(f"the last dimension of the input is {x.shape[-1]}; this layer takes {self.in_features}")
        values: Tensor = self.values
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled("cpu"):
            # Computed in the precision of the weights; only the dtype of the result follows autocast.
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
        # Converted values are new memory at every call: their version does not follow the weights.
        converted = values.dtype is not self.values.dtype
        if self._chain is None or not unchanged(self._chain.watched):
            self._chain = None if converted else self._prepared_chain()
        y = None if self._chain is None else self._chain.chain.run(x)
        if y is None:
            rows = self._rows.of(values, self._pattern, self._engine, fresh=self.training or converted)
            y = self._engine.forward(self._pattern, rows, self._engine.feature_major(x), bias, self.relu)
        return y

    def _prepared_chain(self) -> WatchedChain | None:
        self._chain = None  # frees an outdated copy before the new one is made
        prepared = self.chain_layer()
        if prepared is None:
            return None
        layer, key = prepared
        chain = cast(Kernels, self._engine).chain([layer])
        return WatchedChain(chain, [watch(self, "values", key), watch(self, "bias")])

    # ------------------------------------------------------------------------------------------ dense gradient
    def collect_dense_gradient(self, collect: bool = True) -> None:
        """Start or stop keeping the inputs and output gradients of backward passes.

        They stand for the dense gradient of the weight, summed over the backward passes since the call, or since the
        gradient of `values` was last set to None. Call it with True before the first micro-batch of a step that ends in
        growth by gradient, with False after it.
        """
        if collect:
            self._collector.start(self.values)
        else:
            self._collector.stop()

    @property
    def is_collecting(self) -> bool:
        """Whether the dense gradient is being collected."""
        return self._collector.active

    @property
    def collected(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Feature-major inputs and output gradients of the backward passes collected so far."""
        return self._collector.pairs

    def restore_collected(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Continue from an earlier `collected`, if the gradient is being collected."""
        self._collector.restore(pairs)

    def collected_gradient(self) -> Tensor:
        """Return the collected gradient at the non-zeros of the present pattern: ``[nnz]``, in the order of `values`.

        After `rewire` it includes connections that did not exist in the backward pass.
        """
        return gradient_at(self._pattern, self.values.detach(), self.collected, self._engine)

    def gradient_tiles(self, rows: int = TILE_ROWS) -> Iterator[tuple[int, Tensor]]:
        """Yield ``(first row, tile)`` of the dense gradient collected, tile ``[<= rows, in_features]`` by tile.

        The micro-batches are summed in each tile. Every tile is the same memory. Without a backward pass it is zero.

        Raises:
            ConfigurationError: No gradient is being collected.
        """
        dtype = self.values.dtype if self.values.dtype in _COMPUTED else torch.float32
        return self._collector.tiles((self.out_features, self.in_features), dtype, rows)

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

        The gradient is summed over the micro-batches before its absolute value is taken. Ties, including those at zero,
        are broken by `dst.topology.selection.tie_order`.

        Args:
            k: Number of positions.
            exclude: Sorted row-major flat indices that may not be chosen, such as those kept. All non-zeros if None.
            reduce: Called on every tile, in the same order in every process, to average it over processes in place.
            key: Key of ``tie_order``.

        Returns:
            Sorted row-major flat indices, int64 ``[k]``.

        Raises:
            ConfigurationError: Fewer than k positions may be chosen, or no gradient is being collected.
        """
        exclude = self._pattern.flat() if exclude is None else exclude.contiguous()
        shape = self.out_features, self.in_features
        return largest_gradients(
            k, self.gradient_tiles(), shape, exclude, self._engine, reduce=reduce, key=key
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------ topology
    def row_major(self, entries: Tensor) -> Tensor:
        """Reorder entries, ``[nnz]`` in the order of `values`, by their flat indices."""
        return entries.detach()[self._pattern.permutation]

    def rewire(self, grown: Tensor, dropped: Tensor) -> Tensor:
        """Add and remove connections, both as sorted flat indices; see `set_pattern`."""
        return self.set_pattern(self._engine.merge(without(self._pattern.flat(), dropped), grown))

    def set_pattern(self, indices: Tensor) -> Tensor:
        """Change the positions of the non-zeros.

        Connections that stay keep their values, new ones are zero, the gradient is cleared.

        Args:
            indices: Sorted distinct row-major flat indices, int64; their number may change.

        Returns:
            int64 ``[new nnz]``: the old position of each new position, or -1 where it is new. `remap` carries per-position
            state, such as an optimizer's, over by it.
        """
        new = self._new_pattern(indices)
        source = self._engine.match(self._pattern, new)
        self._set_pattern(new)
        self.values.grad = None
        self.values.data = remap(self.values.data, source)
        return source

    # ------------------------------------------------------------------------------------------ state
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in saved_pattern(self._pattern).items()})

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
        names = [prefix + name for name in NAMES]
        dense = state_dict.get(prefix + "weight")
        if dense is not None and prefix + "values" not in state_dict:
            if dense.shape != self.shape:
                error_msgs.append(
                    f"{prefix}weight: saved with shape {tuple(dense.shape)}, this layer stands for {tuple(self.shape)}"
                )
                return
            try:
                self._set_pattern(self._new_pattern(flat_of_masked(dense, self._pattern)))
            except ValueError as error:
                error_msgs.append(f"{prefix}weight: {error}")
                return
            state_dict = {key: value for key, value in state_dict.items() if key != prefix + "weight"}
            state_dict[prefix + "values"], names = self.from_dense(dense), []
        absent = [name for name in names if name not in state_dict]
        if strict:
            missing_keys.extend(absent)
        if names and not absent:
            pointers, rows = (state_dict[name] for name in names)
            try:
                flat = flat_of_saved(pointers, rows, (self.out_features, self.in_features))
            except ValueError as error:
                error_msgs.append(f"{prefix}row_indices: {error}")
                return
            self._set_pattern(self._new_pattern(flat))
            if self.values.numel() != self.nnz:
                self.values.grad = None
                self.values.data = self.values.data.new_zeros(self.nnz)
        rest = {key: value for key, value in state_dict.items() if key not in names}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self.refresh()

    def state_bytes(self) -> int:
        """Bytes of the values in both orders and of all indices, without gradient and optimizer state."""
        return 2 * self.values.numel() * self.values.element_size() + self._pattern.nbytes

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseLinear:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        # The pattern is immutable and the engine is the process's: both are shared. What is derived is made anew.
        shared = {"_pattern", "_engine"}
        derived = {"_rows": RowCopy(), "_collector": GradientCollector(), "_chain": None}
        for key, value in self.__dict__.items():
            new.__dict__[key] = (
                derived[key] if key in derived else value if key in shared else copy.deepcopy(value, memo)
            )
        return new

    def __getstate__(self) -> dict[str, Any]:
        derived = {"_engine", "_rows", "_collector", "_chain"}
        kept = {key: value for key, value in self.__dict__.items() if key not in derived}
        # Flat indices are pickled: pickle has no 16-bit unsigned tensors, and another machine may have another engine.
        return {**kept, "_pattern": self._pattern.flat()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._engine = engine()
        self._pattern = self._new_pattern(state["_pattern"])
        self._rows, self._collector, self._chain = RowCopy(), GradientCollector(), None


def remap(entries: Tensor, source: Tensor) -> Tensor:
    """Carry per-position entries over a change of pattern.

    Args:
        entries: ``[old nnz]`` values, gradient or optimizer state.
        source: The return value of `SparseLinear.set_pattern`, ``[new nnz]``.

    Returns:
        ``[new nnz]``: old entries, zero at newly grown positions.
    """
    if entries.numel() == 0:
        return entries.new_zeros(source.numel())
    return torch.where(source >= 0, entries[source.clamp(min=0)], torch.zeros((), dtype=entries.dtype))
