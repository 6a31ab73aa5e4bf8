"""A linear layer that stores, trains and saves only its non-zero weights; one public class with its documentation.

Longer methods are functions of `dst.nn.passes` (computing), `dst.nn.topology_change` (patterns and growth),
`dst.nn.layer_state` (loading, copying and pickling) and `dst.nn.dense_conversion`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dst.errors import ConfigurationError
from dst.kernels import ChainLayer, CompiledLayer, ConvPlanes, Engine, Kernels, Pattern, engine
from dst.kernels.pattern import check_flat
from dst.nn import dense_conversion, passes, topology_change
from dst.nn.dense_conversion import filled

# Pickled models refer to FeatureMajorLinear by this module.
from dst.nn.feature_major import FeatureMajorLinear as FeatureMajorLinear
from dst.nn.gradient_collector import TILE_ROWS, GradientCollector
from dst.nn.layer_state import copied, derived_state, load_pattern, pickled
from dst.nn.operators import dispatch_modes, profiler_enabled
from dst.nn.passes import Operators, is_autocast, is_grad_enabled
from dst.nn.row_copy import RowCopy
from dst.nn.saved_pattern import saved_pattern
from dst.nn.topology_change import remap as remap
from dst.nn.watched import CopyKey, WatchedLayer, unchanged
from dst.topology.selection import random_indices


class SparseLinear(nn.Module):
    """``y = x Wᵀ + b``, storing only the non-zeros of ``W``.

    `values`, its gradient and its optimizer state are in column order (by column, then by row). The forward pass reads a
    copy in row order, which every training step refreshes. A non-zero takes at most 28 bytes with its gradient and one
    momentum (24 if both dimensions are at most 65,536). Row and column pointers add 4 bytes per row and per column.

    Inputs and outputs are ordinary row-major tensors, as with ``nn.Linear``.

    In evaluation the copy is refreshed when autograd's version counter of `values` changes, and by `train` and `eval`.
    Call `refresh` after writing through ``values.data`` in evaluation.

    Args:
        in_features: Size of an input.
        out_features: Size of an output.
        indices: Row-major flat positions ``row * in_features + column`` of the non-zeros: int64, sorted, distinct.
        values: Values of the non-zeros in the order of ``indices``. If None, drawn by `reset_parameters`.
        bias: Whether to add a bias.
        relu: Whether to apply ReLU to the output, in the same pass.
        dtype: float32, float64, or a 16-bit type, which computes in float32. If None, the dtype of ``values`` or torch's
            default.
        generator: Generator of the random values.

    Attributes:
        pattern_seed: Seed of the first pattern if `dst.prepare` drew it at random.

    Shape:
        - Input: ``(*, in_features)``.
        - Output: ``(*, out_features)``.

    Raises:
        ConfigurationError: The indices are out of range, unsorted or repeated, the values have another length, or there are
            too many non-zeros.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    _rows: RowCopy
    _collector: GradientCollector
    _prepared: WatchedLayer | None

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
            raise ConfigurationError(f"dtype={dtype} must be a floating-point type")
        self._engine: Engine = engine()
        self._pattern = self._new_pattern(indices)
        self.__dict__.update(derived_state())
        self.pattern_seed: int | None = None
        self.values = nn.Parameter(torch.empty(self.nnz, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters(generator)
        if values is not None:
            if values.shape != (self.nnz,):
                raise ConfigurationError(f"values has shape {tuple(values.shape)}; the indices need ({self.nnz},)")
            with torch.no_grad():
                self.values[self.row_major(torch.arange(self.nnz))] = values.to(dtype)

    # ------------------------------------------------------------------------------------------ construction
    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor, *, relu: bool = False) -> SparseLinear:
        """Create the layer from the weights of ``linear`` where ``mask`` is True, and its bias.

        Args:
            linear: A dense layer on the CPU. It is not changed.
            mask: Bool ``[out_features, in_features]``.
            relu: Whether to apply ReLU to the output.
        """
        return dense_conversion.from_linear(cls, linear, mask, relu)

    @classmethod
    def random(
        cls,
        in_features: int,
        out_features: int,
        nnz: int,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> SparseLinear:
        """Create a layer with exactly ``nnz`` uniformly drawn positions. Does not materialize the dense weight.

        Args:
            in_features: Size of an input.
            out_features: Size of an output.
            nnz: Number of non-zeros, in [0, ``in_features * out_features``].
            generator: Generator of positions and values.
            **options: Passed to the constructor.
        """
        indices = random_indices(in_features * out_features, nnz, generator)
        return cls(in_features, out_features, indices, generator=generator, **options)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw values and bias uniformly from ``[-1/sqrt(f), 1/sqrt(f)]``, where f is the mean active fan-in.

        This is the initialization of ``nn.Linear`` with the fan-in of the sparse layer.
        """
        bound = 1 / math.sqrt(max(1.0, self.nnz / max(1, self.out_features)))
        with torch.no_grad():
            self.values.uniform_(-bound, bound, generator=generator)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound, generator=generator)

    def _new_pattern(self, indices: Tensor) -> Pattern:
        """Build the pattern from row-major positions in the dense weight."""
        check_flat(indices, self.out_features, self.in_features)
        return self._matrix_pattern(indices)

    def _matrix_pattern(self, flat: Tensor) -> Pattern:
        """Build the pattern from row-major positions in the matrix ``[out, in]`` that the kernels read."""
        return self._engine.pattern(flat.contiguous(), self.out_features, self.in_features)

    # ------------------------------------------------------------------------------------------ views of the weight
    @property
    def nnz(self) -> int:
        """Number of non-zeros."""
        return self._pattern.nnz

    @property
    def pattern(self) -> Pattern:
        """Positions of the non-zeros. Immutable; `set_pattern` replaces it."""
        return self._pattern

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(out_features, in_features)`` of the dense weight."""
        return self.out_features, self.in_features

    @property
    def _matrix_shape(self) -> tuple[int, int]:
        """Shape of the dense weight as a matrix: all dimensions but the first are flattened."""
        rows = self.shape[0]
        return rows, self.in_features * self.out_features // max(1, rows)

    def positions(self) -> Tensor:
        """Return the sorted row-major positions of the non-zeros in the dense weight, int64 ``[nnz]``."""
        return self._engine.flat(self._pattern)

    def mask(self) -> Tensor:
        """Return the bool mask ``[out_features, in_features]``."""
        return self._pattern.mask()

    def to_dense(self, entries: Tensor) -> Tensor:
        """Scatter one entry per non-zero (values, gradient or optimizer state) into zeros of shape ``[out, in]``."""
        dense = torch.zeros(self.out_features * self.in_features, dtype=entries.dtype)
        dense[self._pattern.flat_by_position()] = entries.detach()
        return dense.view(self.out_features, self.in_features)

    def from_dense(self, dense: Tensor) -> Tensor:
        """Gather the entries of a dense ``[out, in]`` tensor at the non-zeros, ``[nnz]`` in the order of `values`."""
        return dense.detach().reshape(-1)[self._pattern.flat_by_position()]

    def dense_weight(self) -> Tensor:
        """Return the weight as a dense ``[out_features, in_features]`` tensor, detached."""
        return self.to_dense(self.values)

    def to_linear(self) -> nn.Linear:
        """Return an ``nn.Linear`` with the same weights and bias, without a fused ReLU."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, dtype=self.values.dtype)
        return filled(linear, self)

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        size = max(1, self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, nnz={self.nnz}, "
            f"density={self.nnz / size:.4g}, bias={self.bias is not None}, relu={self.relu}, engine={self._engine.name}"
        )

    # ------------------------------------------------------------------------------------------ computing
    def refresh(self) -> None:
        """Refresh the row-order copy at the next use. Needed after writing through ``values.data`` in evaluation."""
        self._rows.outdate()
        self._prepared = None

    def _set_pattern(self, pattern: Pattern) -> None:
        # Free the old row-order copy before the new one is made, to lower peak memory.
        self._prepared = None
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
        """Set training or evaluation mode; see ``nn.Module.train``."""
        self.refresh()
        return super().train(mode)

    def chain_layer(self) -> tuple[ChainLayer, CopyKey] | None:
        """Prepare the layer for a `dst.kernels.CompiledChain`.

        Returns:
            The layer, and the key that detects when it is outdated. None if only `forward` can compute the layer: in
            training, without compiled kernels, with 16-bit types, or if the kernels cannot read the values or the bias.
        """
        return passes.chain_layer(self)

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """Apply the layer to ``(*, in_features)``.

        Args:
            x: The input.
            gelu: Whether to apply GELU to the output, in the same pass. The backward pass uses its derivative, which the
                forward pass saves.
        """
        prepared = self._prepared
        if (
            prepared is not None
            and not (is_grad_enabled() or is_autocast() or torch.compiler.is_compiling())
            and self._bypasses(x)
            and unchanged(prepared.watched)
        ):
            y = prepared.compiled.run(x, gelu)
            if y is not None:
                return y
        self._check_input(x)
        return passes.forward(self, x, gelu)

    def _check_input(self, x: Tensor) -> None:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"the last dimension of the input is {x.shape[-1]}; this layer takes {self.in_features}")

    def _compute(self, x: Tensor, values: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        """Apply the layer to ``x`` of the dtype of ``values``."""
        lead = x.shape[:-1]
        if x.dim() == 2:
            return passes.apply(self, x, values, bias, gelu)
        return passes.apply(self, x.reshape(-1, self.in_features), values, bias, gelu).view(*lead, self.out_features)

    def _operators(self) -> Operators:
        """The operators of the current pattern and settings."""
        return Operators("sparse_linear", self._pattern, (), self.relu)

    def _bypasses(self, x: Tensor) -> bool:
        """Whether an evaluation may bypass the operator: nothing counts, traces or profiles it."""
        return not (dispatch_modes() or profiler_enabled())

    def _compiled(self, kernels: Kernels, layer: ChainLayer) -> CompiledLayer | ConvPlanes:
        """The layer, prepared for evaluations that `_bypasses` allows."""
        return kernels.layer(layer)

    @staticmethod
    def _pair(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Convert the input and output gradient of a pass to the pair that is collected, or back."""
        return x.t(), g.t()

    def _product(self, x: Tensor, g: Tensor, first: int, last: int, tile: Tensor, add: bool) -> None:
        """Compute rows ``first`` to ``last`` of the dense gradient of one collected pass into ``tile``, or add them."""
        torch.addmm(tile, g[first:last], x.t(), beta=float(add), out=tile)

    # ------------------------------------------------------------------------------------------ dense gradient
    def collect_dense_gradient(self, collect: bool = True) -> None:
        """Start or stop collecting the dense gradient of the weight.

        The layer keeps the inputs and output gradients of the backward passes since the call, or since the gradient of
        `values` was last set to None. The dense gradient is the sum of their products. Call with True before the first
        micro-batch of a step that grows weights by gradient, and with False after it.
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
        """Inputs ``[in, batch]`` and output gradients ``[out, batch]`` of the collected backward passes."""
        return self._collector.pairs

    def restore_collected(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Continue from a saved `collected`, if the gradient is being collected."""
        self._collector.restore(pairs)

    def collected_gradient(self) -> Tensor:
        """Return the collected gradient at the non-zeros of the current pattern, ``[nnz]`` in the order of `values`.

        After `rewire` this includes newly grown weights, which the backward pass did not have.
        """
        return topology_change.collected_gradient(self)

    def gradient_tiles(
        self, rows: int = TILE_ROWS, within: tuple[int, int] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield ``(first row, tile)`` of the collected dense gradient, tile ``[<= rows, in_features]``.

        Tiles are sums over micro-batches, and zero without a backward pass. All tiles share one buffer.

        Args:
            rows: Rows per tile.
            within: Half-open range of rows, by default all. Rows are counted from its start.

        Raises:
            ConfigurationError: The gradient is not being collected.
        """
        return topology_change.gradient_tiles(self, rows, within)

    def dense_gradient(self) -> Tensor:
        """Return the collected dense gradient, ``[out_features, in_features]``. Materializes it: for small layers."""
        return torch.cat([tile.clone() for _, tile in self.gradient_tiles()])

    def grow_candidates(
        self,
        k: int,
        *,
        exclude: Tensor | None = None,
        reduce: Callable[[Tensor], None] | None = None,
        key: int = 0,
        within: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return the k positions with the largest absolute gradient. Does not materialize the dense gradient.

        The absolute value is taken of the sum over micro-batches. `dst.topology.selection.tie_order` breaks ties,
        including ties at zero.

        Args:
            k: Number of positions.
            exclude: Sorted row-major flat indices that may not be chosen. If None, all non-zeros.
            reduce: Called on every tile, in the same order on all ranks, to average it over ranks in place.
            key: Key of ``tie_order``.
            within: Half-open range of rows of the weight to choose from, by default all. Indices, including
                ``exclude``, are then relative to its start, and ``exclude`` is required.

        Returns:
            Sorted row-major flat indices, int64 ``[k]``.

        Raises:
            ConfigurationError: Fewer than k positions may be chosen, or the gradient is not being collected.
        """
        return topology_change.grow_candidates(self, k, exclude, reduce, key, within)

    # ------------------------------------------------------------------------------------------ topology
    def row_major(self, entries: Tensor) -> Tensor:
        """Reorder entries from the order of `values` to row-major order; ``[nnz]``."""
        entries = entries.detach()
        if entries.dtype not in passes.COMPUTED:
            return entries[self._pattern.permutation]
        rows = torch.empty_like(entries, memory_format=torch.contiguous_format)
        self._engine.refresh(self._pattern, entries.contiguous(), rows)
        return rows

    def rewire(self, grown: Tensor, dropped: Tensor) -> Tensor:
        """Grow and drop weights, given as sorted flat indices; see `set_pattern`.

        Raises:
            ConfigurationError: A grown weight is active, or a dropped one is not.
        """
        return topology_change.adopt(self, *self._engine.rewire(self._pattern, grown, dropped))

    def set_pattern(self, indices: Tensor) -> Tensor:
        """Change the positions of the non-zeros.

        Weights that stay active keep their values, newly grown weights are zero, and the gradient is set to None.

        Args:
            indices: Sorted distinct row-major flat indices, int64. Their number may change.

        Returns:
            int64 ``[new nnz]``: the old position of each new position, or -1 where newly grown. Pass it to `remap` to
            convert per-weight state, such as optimizer state.
        """
        new = self._new_pattern(indices)
        return topology_change.adopt(self, new, self._engine.match(self._pattern, new))

    # ------------------------------------------------------------------------------------------ state
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in saved_pattern(self._pattern).items()})

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        _, strict, missing, _, errors = args
        rest = load_pattern(self, state_dict, prefix, missing if strict else [], errors)
        if rest is not None:
            super()._load_from_state_dict(rest, prefix, *args)
            self.refresh()

    def state_bytes(self) -> int:
        """Bytes of the values in both orders and of all indices, without gradient and optimizer state."""
        return 2 * self.values.numel() * self.values.element_size() + self._pattern.nbytes

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseLinear:
        return copied(self, memo)

    def __getstate__(self) -> dict[str, Any]:
        return pickled(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._engine = engine()
        self._pattern = self._new_pattern(state["_pattern"])
        self.__dict__.update(derived_state())
