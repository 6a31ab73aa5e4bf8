"""LSTM and GRU whose weights store, train and save only their non-zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from dst.errors import ConfigurationError
from dst.kernels import Kernels
from dst.nn.operators import dispatch_modes
from dst.nn.passes import COMPUTED, is_autocast
from dst.nn.recurrent_cells import (
    DenseProducts,
    GRUSequence,
    LSTMSequence,
    Products,
    SparseProducts,
    gru_loop,
    lstm_loop,
)
from dst.nn.sparse_linear import SparseLinear

States: TypeAlias = tuple[Tensor, ...]
"""State, and cell of an LSTM."""


class RecurrentWeight(SparseLinear):
    """A weight of a recurrent module: a `SparseLinear` without bias, under the name of the dense weight.

    Attributes:
        dense_type: The dense module, ``nn.LSTM`` or ``nn.GRU``.
    """

    dense_type: type[nn.LSTM] | type[nn.GRU] = nn.LSTM

    def products(self) -> SparseProducts | None:
        """Return the products of a recurrence with this weight, or None if the kernels cannot compute them."""
        values = self.values.detach().contiguous()
        if not isinstance(self._engine, Kernels) or values.dtype not in COMPUTED or values.device.type != "cpu":
            return None
        rows = self._rows.of(values, self._pattern, self._engine, fresh=True)
        return SparseProducts(self._engine, self._pattern, values, rows, self._collector)


class SparseRecurrent(nn.Module):
    """``nn.LSTM`` or ``nn.GRU`` with weights that store only their non-zeros; see `SparseLSTM` and `SparseGRU`."""

    dense_type: type[nn.LSTM] | type[nn.GRU]
    gates: int

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        parts: Mapping[str, nn.Parameter | RecurrentWeight],
        *,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
    ):
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bidirectional
        expected = self._shapes()
        found = {n: p.shape if isinstance(p, RecurrentWeight) else tuple(p.shape) for n, p in parts.items()}
        if found != expected:
            raise ConfigurationError(f"weights {found} do not fit; {type(self).__name__} needs {expected}")
        for name in expected:
            setattr(self, name, parts[name])
            if isinstance(part := parts[name], RecurrentWeight):
                part.dense_type = self.dense_type

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every dense parameter, in the order of the dense module."""
        shapes: dict[str, tuple[int, ...]] = {}
        rows, inputs = self.gates * self.hidden_size, self.input_size
        for layer in range(self.num_layers):
            for suffix in self._suffixes(layer):
                shapes[f"weight_ih{suffix}"], shapes[f"weight_hh{suffix}"] = (rows, inputs), (rows, self.hidden_size)
                if self.bias:
                    shapes[f"bias_ih{suffix}"] = shapes[f"bias_hh{suffix}"] = (rows,)
            inputs = self.hidden_size * (1 + self.bidirectional)
        return shapes

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"][: 1 + self.bidirectional]

    def dense_names(self) -> list[str]:
        """Return the names of the dense module's parameters, in its order."""
        return list(self._shapes())

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, bias={self.bias}, "
            f"batch_first={self.batch_first}, dropout={self.dropout}, bidirectional={self.bidirectional}"
        )

    def flatten_parameters(self) -> None:
        """Do nothing. ``nn.LSTM`` moves its weights together for cuDNN here."""

    def _compute(self, x: Tensor, first: States | None) -> tuple[Tensor, States]:
        """Apply all layers to ``[steps, batch, input]``, or ``[steps, input]``, in the order of ``batch_first``.

        Args:
            x: The input.
            first: First state, and cell, of every layer and direction; zeros if None.

        Returns:
            The output, and the last state, and cell, of every layer and direction.
        """
        if isinstance(x, PackedSequence):
            raise ConfigurationError(
                f"{type(self).__name__} takes no PackedSequence: keep the module masked, with exclude= of dst.prepare and "
                "dst.Sparsifier"
            )
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            raise ValueError(
                f"the input is {tuple(x.shape)}; {type(self).__name__} takes two or three dimensions, the last of size "
                f"{self.input_size}"
            )
        is_batched = x.dim() == 3
        if not is_batched:
            x, first = x.unsqueeze(1), None if first is None else tuple(s.unsqueeze(1) for s in first)
        elif self.batch_first:
            x = x.transpose(0, 1)
        if len(x) == 0:
            raise ValueError(f"{type(self).__name__} takes sequences of one step or more")
        first = self._first(x, first)
        last: list[States] = []
        for layer in range(self.num_layers):
            outputs = []
            for suffix in self._suffixes(layer):
                state = tuple(s[len(last)] for s in first)
                y, *ends = self._direction(x, state, suffix)
                outputs.append(y)
                last.append(tuple(ends))
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
            if self.dropout and self.training and layer < self.num_layers - 1:
                x = functional.dropout(x, self.dropout)
        ends_of_all = tuple(torch.stack(part) for part in zip(*last, strict=True))
        if not is_batched:
            return x.squeeze(1), tuple(s.squeeze(1) for s in ends_of_all)
        return (x.transpose(0, 1) if self.batch_first else x), ends_of_all

    def _first(self, x: Tensor, first: States | None) -> States:
        shape = (self.num_layers * (1 + self.bidirectional), x.shape[1], self.hidden_size)
        if first is None:
            return (x.new_zeros(shape),) * self._states
        for state in first:
            if state.shape != shape:
                raise ValueError(f"a first state is {tuple(state.shape)}; {shape} is needed")
        return first

    _states = 1

    def _direction(self, x: Tensor, first: States, suffix: str) -> States:
        """The outputs of one direction of a layer, and its last state, and cell."""
        weight = getattr(self, f"weight_hh{suffix}")
        biases = (getattr(self, f"bias_ih{suffix}"), getattr(self, f"bias_hh{suffix}")) if self.bias else (None, None)
        projected = _project(getattr(self, f"weight_ih{suffix}"), x)
        reverse = suffix.endswith("_reverse")
        products = None
        if not (dispatch_modes() or is_autocast() or torch.compiler.is_exporting()):
            products = _products(weight, projected)
        if products is None:
            return self._loop(projected, first, biases, weight, reverse)
        parameter = weight.values if isinstance(weight, RecurrentWeight) else weight
        apply = self._sequence
        if torch.compiler.is_compiling():
            # Decorating at import would import the compiler.
            apply = torch.compiler.disable(apply)
        return apply(projected, *first, *biases, parameter, products, reverse)

    def _sequence(self, *args: Any) -> States:
        raise NotImplementedError

    def _loop(
        self,
        projected: Tensor,
        first: States,
        biases: tuple[Tensor | None, Tensor | None],
        weight: Tensor | RecurrentWeight,
        reverse: bool,
    ) -> States:
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A state dict of the dense module.
        for name, module in self._modules.items():
            if isinstance(module, RecurrentWeight) and prefix + name in state_dict:
                state_dict[f"{prefix}{name}.weight"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SparseLSTM(SparseRecurrent):
    """``nn.LSTM`` with weights that store only their non-zeros.

    `forward` takes the arguments of ``nn.LSTM`` and returns its results, except that it takes no ``PackedSequence``. The
    inputs of all steps are projected at once. The gradient of a recurrent weight is computed once for all steps.

    Args:
        input_size: Size of an input.
        hidden_size: Size of a state.
        parts: Name in ``nn.LSTM`` to weight or bias. Weights are `RecurrentWeight` or dense.
        num_layers: Number of layers.
        bias: Whether there are biases.
        batch_first: Whether inputs and outputs are ``(N, T, ...)`` instead of ``(T, N, ...)``.
        dropout: Dropout between layers in training.
        bidirectional: Whether a layer also runs backward.

    Shape:
        - Input: ``(T, N, input_size)``, ``(N, T, input_size)`` with ``batch_first``, or ``(T, input_size)``.
        - First and last state and cell: ``(layers * directions, N, hidden_size)``, or without ``N``.
        - Output: as the input, with ``directions * hidden_size`` features.

    Raises:
        ConfigurationError: The weights do not fit.
    """

    dense_type = nn.LSTM
    gates = 4
    _states = 2

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Apply the module; see ``nn.LSTM.forward``."""
        y, last = self._compute(input, hx)
        return y, (last[0], last[1])

    def _sequence(self, *args: Any) -> States:
        return cast(States, LSTMSequence.apply(*args))

    def _loop(
        self,
        projected: Tensor,
        first: States,
        biases: tuple[Tensor | None, Tensor | None],
        weight: Tensor | RecurrentWeight,
        reverse: bool,
    ) -> States:
        bias = None if biases[0] is None or biases[1] is None else biases[0] + biases[1]
        return lstm_loop(projected, first[0], first[1], bias, lambda h: _project(weight, h), reverse)


class SparseGRU(SparseRecurrent):
    """``nn.GRU`` with weights that store only their non-zeros; arguments, shapes and errors as for `SparseLSTM`."""

    dense_type = nn.GRU
    gates = 3

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the module; see ``nn.GRU.forward``."""
        y, last = self._compute(input, None if hx is None else (hx,))
        return y, last[0]

    def _sequence(self, *args: Any) -> States:
        return cast(States, GRUSequence.apply(*args))

    def _loop(
        self,
        projected: Tensor,
        first: States,
        biases: tuple[Tensor | None, Tensor | None],
        weight: Tensor | RecurrentWeight,
        reverse: bool,
    ) -> States:
        return gru_loop(projected, first[0], biases[0], biases[1], lambda h: _project(weight, h), reverse)


def _project(weight: Tensor | RecurrentWeight, x: Tensor) -> Tensor:
    return weight(x) if isinstance(weight, RecurrentWeight) else functional.linear(x, weight)


def _products(weight: Tensor | RecurrentWeight, like: Tensor) -> Products | None:
    if isinstance(weight, RecurrentWeight):
        return weight.products()
    return DenseProducts(weight.detach()) if weight.dtype is like.dtype else None
