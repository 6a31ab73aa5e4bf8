"""The sparse layers as ``torch.library`` operators: ``torch.ops.dst.sparse_linear`` and ``sparse_conv2d``.

Compilers, exporters, profilers and FLOP counters see one named operator per pass. Each operator has a fake implementation
for tracing, an autograd formula, and the operations of its non-zeros for ``torch.utils.flop_counter``. A pattern is passed
as its five index tensors, in the order of ``INDICES``. An evaluation bypasses the operators unless a compiler, a profiler
or a dispatch mode is active.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from dst.kernels import Kernels, Pattern, engine
from dst.kernels.geometry import ConvShape

# torch has no fast public functions for these.
dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
profiler_enabled: Callable[[], bool] = getattr(torch.autograd, "_profiler_enabled", lambda: True)

INDICES = ("column_pointers", "row_indices", "row_pointers", "column_indices", "permutation")

_library = torch.library.Library("dst", "DEF")
_library.define(
    "sparse_linear(Tensor x, Tensor values, Tensor? row_values, Tensor? bias, Tensor[] pattern, bool relu) -> Tensor"
)
_library.define(
    "sparse_linear_gelu(Tensor x, Tensor values, Tensor? row_values, Tensor? bias, Tensor[] pattern, bool derivative) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "sparse_linear_backward(Tensor g, Tensor x, Tensor values, Tensor? y, Tensor[] pattern, bool input, bool bias, "
    "Tensor? derivative=None) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "sparse_conv2d(Tensor x, Tensor values, Tensor? row_values, Tensor? bias, Tensor[] pattern, int[2] kernel, "
    "int[2] stride, int[2] padding, int[2] dilation, bool relu) -> Tensor"
)
_library.define(
    "sparse_conv2d_backward(Tensor g, Tensor x, Tensor values, Tensor? y, Tensor[] pattern, int[2] kernel, int[2] stride, "
    "int[2] padding, int[2] dilation, bool input, bool bias) -> (Tensor, Tensor, Tensor)"
)


def indices_of(pattern: Pattern) -> list[Tensor]:
    """Return the index tensors of a pattern, in the order of ``INDICES``."""
    return [getattr(pattern, name) for name in INDICES]


def _pattern(indices: Sequence[Tensor] | Pattern) -> Pattern:
    if isinstance(indices, Pattern):
        return indices
    return Pattern(indices[2].numel() - 1, indices[0].numel() - 1, *indices)


def _in_rows(pattern: Pattern, values: Tensor, row_values: Tensor | None) -> Tensor:
    """Return the values in row order; a copy unless ``row_values`` is given."""
    if row_values is not None:
        return row_values
    row_values = torch.empty_like(values)
    engine().refresh(pattern, values.contiguous(), row_values)
    return row_values


def _present(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Return the gradient, or a new empty tensor: outputs of an operator cannot be None or share memory."""
    return like.new_empty(0) if gradient is None else gradient


Gradients: TypeAlias = tuple[Tensor | None, Tensor, Tensor | None]
"""Gradients of input, values and bias. Those of input and bias are None if they are not needed."""


def _wanted(ctx: Any) -> tuple[bool, bool]:
    """Whether the gradients of input and bias are needed."""
    return ctx.needs_input_grad[0], ctx.has_bias and ctx.needs_input_grad[3]


def _asked(gradients: tuple[Tensor, Tensor, Tensor], input: bool, bias: bool) -> Gradients:
    gx, gv, gb = gradients
    return gx if input else None, gv, gb if bias else None


# -- linear layers ----------------------------------------------------------------------------------------------------


def _linear(
    x: Tensor,
    values: Tensor,
    row_values: Tensor | None,
    bias: Tensor | None,
    indices: Sequence[Tensor] | Pattern,
    relu: bool,
) -> Tensor:
    kernels, pattern = engine(), _pattern(indices)
    rows = _in_rows(pattern, values, row_values)
    if x.shape[0] > 1 and isinstance(kernels, Kernels):
        return kernels.rows_forward(pattern, rows, x, bias, relu)
    return kernels.forward(pattern, rows, kernels.feature_major(x), bias, relu).contiguous()


def _linear_gelu(
    x: Tensor,
    values: Tensor,
    row_values: Tensor | None,
    bias: Tensor | None,
    indices: Sequence[Tensor] | Pattern,
    derivative: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output after GELU, and GELU's derivative for the backward pass (empty unless ``derivative``)."""
    kernels, pattern = engine(), _pattern(indices)
    rows = _in_rows(pattern, values, row_values)
    if isinstance(kernels, Kernels):
        slope = x.new_empty(x.shape[0], pattern.rows) if derivative else None
        y = kernels.rows_forward(pattern, rows, x, bias, gelu=True, derivative=slope)
        return y, x.new_empty(0) if slope is None else slope
    z = kernels.forward(pattern, rows, kernels.feature_major(x), bias, False).contiguous()
    slope = torch.ops.aten.gelu_backward(torch.ones_like(z), z) if derivative else x.new_empty(0)
    return functional.gelu(z), slope


def _linear_backward(
    g: Tensor,
    x: Tensor,
    values: Tensor,
    y: Tensor | None,
    indices: Sequence[Tensor] | Pattern,
    input: bool,
    bias: bool,
    derivative: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels, pattern = engine(), _pattern(indices)
    if x.shape[0] > 1 and isinstance(kernels, Kernels):
        gx, gv, gb = kernels.rows_backward(
            pattern, values.contiguous(), x, g, y, input=input, bias=bias, derivative=derivative
        )
    else:
        g = g if derivative is None else g * derivative
        output = None if y is None else kernels.feature_major(y).t()
        gx, gv, gb, _ = kernels.backward(
            pattern, values.contiguous(), kernels.feature_major(x), g, output, input=input, bias=bias
        )
        gx = None if gx is None else gx.contiguous()
    return _present(gx, values), gv, _present(gb, values)


@torch.library.register_fake("dst::sparse_linear", lib=_library)
def _(x: Tensor, values: Tensor, row_values: Any, bias: Any, pattern: Any, relu: bool) -> Tensor:
    return x.new_empty((x.shape[0], pattern[2].shape[0] - 1))


@torch.library.register_fake("dst::sparse_linear_gelu", lib=_library)
def _(x: Tensor, values: Tensor, row_values: Any, bias: Any, pattern: Any, derivative: bool) -> tuple[Tensor, Tensor]:
    shape = x.shape[0], pattern[2].shape[0] - 1
    return x.new_empty(shape), x.new_empty(shape if derivative else 0)


@torch.library.register_fake("dst::sparse_linear_backward", lib=_library)
def _(
    g: Tensor,
    x: Tensor,
    values: Tensor,
    y: Any,
    pattern: Any,
    input: bool,
    bias: bool,
    derivative: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    gx, gb = x.new_empty(x.shape if input else 0), g.new_empty(g.shape[1] if bias else 0)
    return gx, torch.empty_like(values), gb


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, bias, pattern, relu = inputs
    ctx.save_for_backward(x, values, output if relu else None, *pattern)
    ctx.has_bias = bias is not None


@once_differentiable
def _linear_gradients(ctx: Any, g: Tensor) -> Gradients:
    x, values, y, *pattern = ctx.saved_tensors
    wanted = _wanted(ctx)
    return _asked(torch.ops.dst.sparse_linear_backward(g, x, values, y, pattern, *wanted), *wanted)


def _linear_formula(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    gx, gv, gb = _linear_gradients(ctx, g)
    return gx, gv, None, gb, [None] * len(INDICES), None


def _gelu_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, values, _, bias, pattern, _ = inputs
    ctx.save_for_backward(x, values, output[1], *pattern)
    ctx.mark_non_differentiable(output[1])
    ctx.has_bias = bias is not None


@once_differentiable
def _gelu_gradients(ctx: Any, g: Tensor) -> Gradients:
    x, values, slope, *pattern = ctx.saved_tensors
    wanted = _wanted(ctx)
    return _asked(torch.ops.dst.sparse_linear_backward(g, x, values, None, pattern, *wanted, slope), *wanted)


def _gelu_formula(ctx: Any, g: Tensor, _: Any) -> tuple[Any, ...]:
    gx, gv, gb = _gelu_gradients(ctx, g)
    return gx, gv, None, gb, [None] * len(INDICES), None


# -- convolutions -----------------------------------------------------------------------------------------------------


def _conv(
    x: Tensor,
    values: Tensor,
    row_values: Tensor | None,
    bias: Tensor | None,
    indices: Sequence[Tensor] | Pattern,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
) -> Tensor:
    kernels, pattern = engine(), _pattern(indices)
    rows = _in_rows(pattern, values, row_values)
    shape = ConvShape(x.shape, pattern.rows, _two(kernel), _two(stride), _two(padding), _two(dilation))
    return kernels.conv_forward(pattern, shape, rows, x.contiguous(), bias, relu)


def _conv_backward(
    g: Tensor,
    x: Tensor,
    values: Tensor,
    y: Tensor | None,
    indices: Sequence[Tensor] | Pattern,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    input: bool,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels, pattern = engine(), _pattern(indices)
    shape = ConvShape(x.shape, pattern.rows, _two(kernel), _two(stride), _two(padding), _two(dilation))
    if y is not None:
        g = torch.ops.aten.threshold_backward(g, y, 0)
    gx, gv, gb = kernels.conv_backward(
        pattern, shape, values.contiguous(), x.contiguous(), g.contiguous(), input=input, bias=bias
    )
    return _present(gx, values), gv, _present(gb, values)


def _two(sizes: Sequence[int]) -> tuple[int, int]:
    return int(sizes[0]), int(sizes[1])


@torch.library.register_fake("dst::sparse_conv2d", lib=_library)
def _(
    x: Tensor,
    values: Tensor,
    row_values: Any,
    bias: Any,
    pattern: Any,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    relu: bool,
) -> Tensor:
    size = [
        (n + 2 * p - (k - 1) * d - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    return x.new_empty((x.shape[0], pattern[2].shape[0] - 1, *size))


@torch.library.register_fake("dst::sparse_conv2d_backward", lib=_library)
def _(
    g: Tensor,
    x: Tensor,
    values: Tensor,
    y: Any,
    pattern: Any,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    input: bool,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gx, gb = x.new_empty(x.shape if input else 0), g.new_empty(g.shape[1] if bias else 0)
    return gx, torch.empty_like(values), gb


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, bias, pattern, *ctx.sizes, relu = inputs
    ctx.save_for_backward(x, values, output if relu else None, *pattern)
    ctx.has_bias = bias is not None


@once_differentiable
def _conv_gradients(ctx: Any, g: Tensor) -> Gradients:
    x, values, y, *pattern = ctx.saved_tensors
    wanted = _wanted(ctx)
    return _asked(torch.ops.dst.sparse_conv2d_backward(g, x, values, y, pattern, *ctx.sizes, *wanted), *wanted)


def _conv_formula(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    gx, gv, gb = _conv_gradients(ctx, g)
    return gx, gv, None, gb, [None] * len(INDICES), *[None] * 5


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "sparse_linear": _linear,
    "sparse_linear_gelu": _linear_gelu,
    "sparse_linear_backward": _linear_backward,
    "sparse_conv2d": _conv,
    "sparse_conv2d_backward": _conv_backward,
}
for _name, _function in _IMPLEMENTATIONS.items():
    _library.impl(_name, _function, "CPU")
torch.library.register_autograd("dst::sparse_linear", _linear_formula, setup_context=_linear_setup, lib=_library)
torch.library.register_autograd("dst::sparse_linear_gelu", _gelu_formula, setup_context=_gelu_setup, lib=_library)
torch.library.register_autograd("dst::sparse_conv2d", _conv_formula, setup_context=_conv_setup, lib=_library)


def call(name: str, *args: Any) -> Any:
    """Call an operator on CPU tensors within an autograd function. ``args`` has a `Pattern` instead of its index tensors.

    The dispatcher takes longer than a small layer. It is used only if it has an observer: a compiler, a profiler or a
    dispatch mode such as torch's FLOP counter.
    """
    if torch.compiler.is_compiling() or profiler_enabled() or dispatch_modes():
        given = [indices_of(a) if isinstance(a, Pattern) else a for a in args]
        return getattr(torch.ops.dst, name).default(*given)
    return _IMPLEMENTATIONS[name](*args)


# -- floating-point operations, from shapes ---------------------------------------------------------------------------


@register_flop_formula([torch.ops.dst.sparse_linear, torch.ops.dst.sparse_linear_gelu])
def _linear_flops(x: Sequence[int], values: Sequence[int], *rest: Any, **options: Any) -> int:
    return 2 * values[0] * x[0]


@register_flop_formula(torch.ops.dst.sparse_linear_backward)
def _linear_backward_flops(
    g: Sequence[int],
    x: Sequence[int],
    values: Sequence[int],
    y: Any,
    pattern: Any,
    input: bool,
    *rest: Any,
    **options: Any,
) -> int:
    return 2 * values[0] * g[0] * (1 + input)


@register_flop_formula(torch.ops.dst.sparse_conv2d)
def _conv_flops(x: Sequence[int], values: Sequence[int], *rest: Any, out_shape: Sequence[int], **options: Any) -> int:
    return 2 * values[0] * out_shape[0] * prod(out_shape[2:])


@register_flop_formula(torch.ops.dst.sparse_conv2d_backward)
def _conv_backward_flops(
    g: Sequence[int],
    x: Sequence[int],
    values: Sequence[int],
    y: Any,
    pattern: Any,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    input: bool,
    *rest: Any,
    **options: Any,
) -> int:
    return 2 * values[0] * g[0] * prod(g[2:]) * (1 + input)
