"""The recurrences of LSTM and GRU over whole sequences, with gradients by hand.

A step computes on ``[features, batch]`` tensors, because the kernels then divide the outputs among threads, however small
the batch is. The backward pass computes only the gradient of the state step by step. The gradient of the recurrent weight is
one product over all steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dst.kernels import Kernels, Pattern
from dst.nn.gradient_collector import GradientCollector

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


class Products(Protocol):
    """The products of a recurrence with its weight ``W``, ``[gates * hidden, hidden]``."""

    def forward(self, x: Tensor, out: Tensor) -> None:
        """Write ``W x`` to ``out``; ``x`` is ``[hidden, batch]``."""

    def transposed(self, g: Tensor) -> Tensor:
        """Return ``Wᵀ g``; ``g`` is ``[gates * hidden, batch]``."""

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """Return the weight's gradient from states ``[rows, hidden]`` and gradients ``[rows, gates * hidden]``."""

    def turn(self, x: Tensor) -> Tensor:
        """Return the transpose of a matrix, contiguous. It may share memory with ``x``."""


class DenseProducts:
    """Products with an ordinary weight.

    Args:
        weight: The weight, detached.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def forward(self, x: Tensor, out: Tensor) -> None:
        """See `Products`."""
        torch.mm(self._weight, x, out=out)

    def transposed(self, g: Tensor) -> Tensor:
        """See `Products`."""
        return self._weight.t() @ g

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """See `Products`."""
        return g.t() @ x

    def turn(self, x: Tensor) -> Tensor:
        """See `Products`."""
        return x.t().contiguous()


class SparseProducts:
    """Products with a weight that stores only its non-zeros, by the compiled kernels.

    Args:
        kernels: The kernels.
        pattern: Positions of the non-zeros.
        values: The values in column order, ``[nnz]``, detached and contiguous.
        row_values: The values in row order. Only `forward` reads them.
        collector: Receives the states and gradients of a backward pass.
    """

    def __init__(
        self, kernels: Kernels, pattern: Pattern, values: Tensor, row_values: Tensor, collector: GradientCollector
    ) -> None:
        self._kernels, self._pattern, self._values, self._rows = kernels, pattern, values, row_values
        self._collector = collector

    def forward(self, x: Tensor, out: Tensor) -> None:
        """See `Products`."""
        self._kernels.forward(self._pattern, self._rows, x, None, False, out=out)

    def transposed(self, g: Tensor) -> Tensor:
        """See `Products`."""
        return self._kernels.transposed_product(self._pattern, self._values, g)

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """See `Products`."""
        self._collector.add(x.t(), g.t())
        return self._kernels.rows_backward(self._pattern, self._values, x, g, None, input=False, bias=False)[1]

    def turn(self, x: Tensor) -> Tensor:
        """See `Products`."""
        return self._kernels.feature_major(x)


class LSTMSequence(torch.autograd.Function):
    """One direction of an LSTM layer. The gates are in torch's order: input, forget, cell, output."""

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        h: Tensor,
        c: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        weight: Tensor,
        products: Products,
        reverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the outputs ``[steps, batch, hidden]``, the last state and the last cell.

        Args:
            ctx: Autograd's context.
            projected: Products of inputs and input weight, ``[steps, batch, 4 * hidden]``.
            h: First state, ``[batch, hidden]``.
            c: First cell, ``[batch, hidden]``.
            bias_ih: Bias of the input projection, or None.
            bias_hh: Bias of the recurrent projection, or None.
            weight: Parameter of the recurrent weight: the dense weight, or its values.
            products: The products with it.
            reverse: Whether the first step is the last of the sequence.
        """
        steps, batch, size = len(projected), *h.shape
        gates, cells = h.new_empty(steps, 4 * size, batch), h.new_empty(steps + 1, size, batch)
        tanhs, y = h.new_empty(steps, size, batch), h.new_empty(steps, batch, size)
        cells[0], state = c.t(), products.turn(h)
        shift = None if bias_ih is None or bias_hh is None else (bias_ih + bias_hh).unsqueeze(1)
        order = _order(steps, reverse)
        for k, t in enumerate(order):
            z = gates[k]
            products.forward(state, z)
            z.add_(products.turn(projected[t]))
            if shift is not None:
                z.add_(shift)
            z[: 2 * size].sigmoid_()
            z[2 * size : 3 * size].tanh_()
            z[3 * size :].sigmoid_()
            i, f, g, o = z.chunk(4)
            cell = torch.mul(f, cells[k], out=cells[k + 1]).addcmul_(i, g)
            state = o * torch.tanh(cell, out=tanhs[k])
            y[t] = products.turn(state)
        ctx.save_for_backward(gates, cells, tanhs, y, h, weight)
        ctx.products, ctx.order = products, order
        return y, y[order[-1]].clone(), cells[-1].t().contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """See ``torch.autograd.Function``."""
        gates, cells, tanhs, y, first, _ = ctx.saved_tensors
        products, order = ctx.products, ctx.order
        steps, batch, size = y.shape
        before = y.new_empty(steps, batch, 4 * size)
        dz = y.new_empty(4 * size, batch)
        di, df, dg, do = dz.chunk(4)
        gh, gc = products.turn(grads[1]), products.turn(grads[2])
        for k in range(steps - 1, -1, -1):
            t = order[k]
            i, f, g, o = gates[k].chunk(4)
            gh = gh + products.turn(grads[0][t])
            _sigmoid_backward(gh * tanhs[k], o, grad_input=do)
            gc = gc + torch.ops.aten.tanh_backward(gh * o, tanhs[k])
            _sigmoid_backward(gc * g, i, grad_input=di)
            _sigmoid_backward(gc * cells[k], f, grad_input=df)
            _tanh_backward(gc * i, g, grad_input=dg)
            gc = gc * f
            before[t] = products.turn(dz)
            gh = products.transposed(dz)
        rows = before.flatten(0, 1)
        gb = rows.sum(0) if ctx.needs_input_grad[3] or ctx.needs_input_grad[4] else None
        gw = products.gradient(_earlier(y, first, order), rows) if ctx.needs_input_grad[5] else None
        return before, products.turn(gh), products.turn(gc), gb, gb, gw, None, None


class GRUSequence(torch.autograd.Function):
    """One direction of a GRU layer. The gates are in torch's order: reset, update, new."""

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        h: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        weight: Tensor,
        products: Products,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return the outputs ``[steps, batch, hidden]`` and the last state; arguments as for `LSTMSequence`."""
        steps, batch, size = len(projected), *h.shape
        gates, y = h.new_empty(steps, 3 * size, batch), h.new_empty(steps, batch, size)
        news, states = h.new_empty(steps, size, batch), h.new_empty(steps + 1, size, batch)
        states[0] = h.t()
        order = _order(steps, reverse)
        for k, t in enumerate(order):
            z, x = gates[k], products.turn(projected[t])
            products.forward(states[k], z)
            if bias_ih is not None and bias_hh is not None:
                z.add_(bias_hh.unsqueeze(1))
                x = x + bias_ih.unsqueeze(1)
            z[: 2 * size].add_(x[: 2 * size]).sigmoid_()
            r, u, inner = z.chunk(3)
            torch.addcmul(x[2 * size :], r, inner, out=news[k]).tanh_()
            torch.lerp(news[k], states[k], u, out=states[k + 1])
            y[t] = products.turn(states[k + 1])
        ctx.save_for_backward(gates, news, states, y, h, weight)
        ctx.products, ctx.order = products, order
        return y, y[order[-1]].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """See ``torch.autograd.Function``."""
        gates, news, states, y, first, _ = ctx.saved_tensors
        products, order = ctx.products, ctx.order
        steps, batch, size = y.shape
        of_input, of_state = y.new_empty(steps, batch, 3 * size), y.new_empty(steps, batch, 3 * size)
        dz = y.new_empty(3 * size, batch)
        dr, du, dn = dz.chunk(3)
        gh = products.turn(grads[1])
        for k in range(steps - 1, -1, -1):
            t = order[k]
            r, u, inner = gates[k].chunk(3)
            gh = gh + products.turn(grads[0][t])
            _sigmoid_backward(gh * (states[k] - news[k]), u, grad_input=du)
            kept = gh * u
            _tanh_backward(gh - kept, news[k], grad_input=dn)
            _sigmoid_backward(dn * inner, r, grad_input=dr)
            of_input[t] = products.turn(dz)
            dn.mul_(r)
            of_state[t] = products.turn(dz)
            gh = kept.add_(products.transposed(dz))
        rows = of_state.flatten(0, 1)
        gi = of_input.flatten(0, 1).sum(0) if ctx.needs_input_grad[2] else None
        gb = rows.sum(0) if ctx.needs_input_grad[3] else None
        gw = products.gradient(_earlier(y, first, order), rows) if ctx.needs_input_grad[4] else None
        return of_input, products.turn(gh), gi, gb, gw, None, None


def lstm_loop(
    projected: Tensor, h: Tensor, c: Tensor, bias: Tensor | None, project: Callable[[Tensor], Tensor], reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `LSTMSequence` computes with torch's operators, which compilers and counters see.

    Args:
        projected: As for `LSTMSequence`.
        h: As for `LSTMSequence`.
        c: As for `LSTMSequence`.
        bias: Sum of both biases, or None.
        project: Applies the recurrent weight to a state.
        reverse: As for `LSTMSequence`.
    """
    projected = projected if bias is None else projected + bias
    found: dict[int, Tensor] = {}
    for t in _order(len(projected), reverse):
        i, f, g, o = (projected[t] + project(h)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = found[t] = o.sigmoid() * c.tanh()
    return torch.stack([found[t] for t in sorted(found)]), h, c


def gru_loop(
    projected: Tensor,
    h: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    project: Callable[[Tensor], Tensor],
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Compute what `GRUSequence` computes with torch's operators; arguments as for it and for `lstm_loop`."""
    projected = projected if bias_ih is None else projected + bias_ih
    found: dict[int, Tensor] = {}
    for t in _order(len(projected), reverse):
        of_state = project(h) if bias_hh is None else project(h) + bias_hh
        (r, u, n), (hr, hu, hn) = projected[t].chunk(3, 1), of_state.chunk(3, 1)
        u = (u + hu).sigmoid()
        n = (n + (r + hr).sigmoid() * hn).tanh()
        h = found[t] = n + u * (h - n)
    return torch.stack([found[t] for t in sorted(found)]), h


def _order(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def _earlier(y: Tensor, first: Tensor, order: range) -> Tensor:
    """The state before every step, ``[steps * batch, hidden]``."""
    earlier = torch.empty_like(y)
    if order.step > 0:
        earlier[1:], earlier[0] = y[:-1], first
    else:
        earlier[:-1], earlier[-1] = y[1:], first
    return earlier.flatten(0, 1)
