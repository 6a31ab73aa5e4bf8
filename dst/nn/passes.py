"""The forward and backward pass of a sparse layer: dtypes, operators, autograd, and the fast path of evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dst.errors import ConfigurationError
from dst.kernels import ChainLayer, Kernels, Pattern
from dst.nn.operators import call, dispatch_modes
from dst.nn.watched import CopyKey, WatchedLayer, readable, unchanged, watch

if TYPE_CHECKING:
    from dst.nn.sparse_linear import SparseLinear

COMPUTED = (torch.float32, torch.float64)
"""The dtypes in which the engines compute."""

# Called at every evaluation, so both must be fast. torch has no fast public function for the second.
is_grad_enabled = torch.is_grad_enabled
is_autocast: Callable[[], bool] = getattr(
    torch._C, "_is_any_autocast_enabled", lambda: torch.is_autocast_enabled("cpu")
)


class Operators(NamedTuple):
    """The operators of a layer with one pattern. The layer may get another pattern before the backward pass.

    Attributes:
        name: Name of the forward operator in ``torch.ops.dst``.
        pattern: Positions of the non-zeros.
        sizes: Kernel, stride, padding and dilation of a convolution; empty for a linear layer.
        relu: Whether to apply ReLU to the output.
    """

    name: str
    pattern: Pattern
    sizes: tuple[tuple[int, int], ...]
    relu: bool

    def output(
        self,
        x: Tensor,
        values: Tensor,
        rows: Tensor | None,
        bias: Tensor | None,
        gelu: bool,
        derivative: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output. With ``gelu`` also return GELU's derivative, which is empty unless ``derivative``."""
        if gelu:
            return call(f"{self.name}_gelu", x, values, rows, bias, self.pattern, derivative)
        return call(self.name, x, values, rows, bias, self.pattern, *self.sizes, self.relu), None

    def gradients(
        self,
        g: Tensor,
        x: Tensor,
        values: Tensor,
        *,
        y: Tensor | None = None,
        derivative: Tensor | None = None,
        input: bool = False,
        bias: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of input, values and bias. Those of input and bias are empty unless requested."""
        slope = () if derivative is None else (derivative,)
        return call(f"{self.name}_backward", g, x, values, y, self.pattern, *self.sizes, input, bias, *slope)


class _Apply(torch.autograd.Function):
    """The layer's operators. The backward pass adds its input and output gradient to the layer's collector."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: SparseLinear, gelu: bool) -> Tensor:
        values, operators = values.contiguous(), layer._operators()
        rows = layer._rows.of(values, layer._pattern, layer._engine, fresh=True)
        y, derivative = operators.output(x, values, rows, bias, gelu)
        ctx.save_for_backward(x, values, y if layer.relu else None, derivative)
        ctx.operators, ctx.pair = operators, layer._pair
        ctx.collector, ctx.has_bias = layer._collector, bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (x, values, y, derivative), g = ctx.saved_tensors, grads[0]
        input, bias = ctx.needs_input_grad[0], ctx.has_bias and ctx.needs_input_grad[2]
        if ctx.collector.active:
            if derivative is not None:
                g, derivative = g * derivative, None
            elif y is not None:
                g, y = torch.ops.aten.threshold_backward(g, y, 0), None
            ctx.collector.add(*ctx.pair(x, g))
        gx, gv, gb = ctx.operators.gradients(g, x, values, y=y, derivative=derivative, input=input, bias=bias)
        return gx if input else None, gv, gb if bias else None, None, None


def forward(layer: SparseLinear, x: Tensor, gelu: bool) -> Tensor:
    """Apply ``layer`` to ``x`` in a dtype that the engines compute, and return the output in the dtype of ``x``.

    Under autocast the layer computes in the dtype of its weights, and only the output has autocast's dtype.

    Raises:
        ValueError: The dtype of ``x`` is not that of the weights.
        ConfigurationError: The input or the weights are not on the CPU.
    """
    values: Tensor = layer.values
    bias: Tensor | None = layer.bias
    if torch.is_autocast_enabled("cpu"):
        wanted = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            return layer.forward(x.to(values.dtype), gelu).to(wanted)
    wanted = x.dtype
    if x.dtype != values.dtype:
        raise ValueError(f"the input is {x.dtype}, this layer's weights are {values.dtype}")
    if x.device.type != "cpu" or values.device.type != "cpu":
        raise ConfigurationError(
            f"sparse layers compute on the CPU; the input is on {x.device}, the weights on {values.device}. "
            "Use the masked backend on other devices"
        )
    if values.dtype not in COMPUTED:
        values = values.float()
        bias = None if bias is None else bias.float()
    if values.dtype is wanted:
        return layer._compute(x, values, bias, gelu)
    return layer._compute(x.to(values.dtype), values, bias, gelu).to(wanted)


def apply(layer: SparseLinear, x: Tensor, values: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """Apply the operators of ``layer`` to ``x`` of the shape they take and of the dtype of ``values``."""
    compiling = torch.compiler.is_compiling()
    if (compiling or dispatch_modes()) and not layer._collector.active:
        # Tensors may be fake: they are neither copied nor looked up.
        return layer._operators().output(x, values, None, bias, gelu, torch.is_grad_enabled())[0]
    if compiling:
        # Decorating at import would import the compiler.
        return cast(Tensor, torch.compiler.disable(_Apply.apply)(x, values, bias, layer, gelu))
    if torch.is_grad_enabled() and (
        values.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return cast(Tensor, _Apply.apply(x, values, bias, layer, gelu))
    return _evaluate(layer, x.detach(), values.detach(), bias, gelu)


def _evaluate(layer: SparseLinear, x: Tensor, values: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    # Converted values are a new tensor at every call, so their version counter says nothing about the weights.
    converted = values.dtype is not layer.values.dtype
    y = None
    if layer._bypasses(x):
        prepared = layer._prepared  # another thread may replace it
        if prepared is None or not unchanged(prepared.watched):
            prepared = layer._prepared = None if converted else _prepare(layer)
        y = None if prepared is None else prepared.compiled.run(x, gelu)
    if y is None:
        rows = layer._rows.of(values, layer._pattern, layer._engine, fresh=layer.training or converted)
        y = layer._operators().output(x, values, rows, bias, gelu, False)[0]
    return y


def _prepare(layer: SparseLinear) -> WatchedLayer | None:
    layer._prepared = None  # frees an outdated copy before the new one is made
    prepared = layer.chain_layer()
    if prepared is None:
        return None
    single, key = prepared
    compiled = layer._compiled(cast(Kernels, layer._engine), single)
    return WatchedLayer(compiled, [watch(layer, "values", key), watch(layer, "bias")])


def chain_layer(layer: SparseLinear) -> tuple[ChainLayer, CopyKey] | None:
    """Prepare a layer for a `dst.kernels.CompiledChain`; see `SparseLinear.chain_layer`."""
    values, bias = layer._parameters["values"], layer._parameters["bias"]
    if layer.training or not isinstance(layer._engine, Kernels) or not readable(values, (layer.nnz,)):
        return None
    # Values created in inference mode have no version counter.
    if values is None or values.is_inference() or values.dtype not in COMPUTED:
        return None
    if bias is not None and not (readable(bias, (layer.out_features,)) and bias.dtype is values.dtype):
        return None
    rows = layer._rows.of(values.detach(), layer._pattern, layer._engine, fresh=False)
    shift = None if bias is None else bias.detach()
    prepared = ChainLayer(layer.out_features, layer.in_features, layer._pattern, rows, shift, layer.relu)
    return prepared, cast(CopyKey, layer._rows.key)
