"""Weights that are active together: tiles, outputs, heads, diagonals."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dst.pieces.patterns.grouped import (
    Grouped,
    check_positive,
    matrix_of,
    matrix_shape,
)
from dst.topology.layers import SparseLayer


@dataclass(frozen=True)
class Block(Grouped):
    """Tiles of ``height`` outputs by ``width`` inputs are active together.

    If a tile does not divide a side of the layer, their greatest common divisor replaces the tile's side: a layer of 10
    outputs has tiles of height 2 for ``height=4``. Inputs of a convolution are (channel, kernel row, kernel column).

    Attributes:
        height: Outputs per tile, >= 1.
        width: Inputs per tile, >= 1.
    """

    height: int = 4
    width: int = 4

    def __post_init__(self) -> None:
        check_positive(height=self.height, width=self.width)

    def arrange(self, layer: SparseLayer, tensor: Tensor, absent: float = 0) -> Tensor:
        """See ``Grouped``."""
        height, width = self._tile(layer)
        outputs, inputs = matrix_shape(layer)
        tiles = matrix_of(layer, tensor).reshape(outputs // height, height, inputs // width, width).transpose(1, 2)
        return tiles.reshape(1, -1, height * width)

    def _elements(self, layer: SparseLayer) -> int:
        return math.prod(self._tile(layer))

    def _tile(self, layer: SparseLayer) -> tuple[int, int]:
        outputs, inputs = matrix_shape(layer)
        return math.gcd(self.height, outputs), math.gcd(self.width, inputs)


@dataclass(frozen=True)
class Neuron(Grouped):
    """All weights of an output are active together: neurons of a linear layer, output channels of a convolution."""

    def arrange(self, layer: SparseLayer, tensor: Tensor, absent: float = 0) -> Tensor:
        """See ``Grouped``."""
        return matrix_of(layer, tensor)[None]

    def _elements(self, layer: SparseLayer) -> int:
        return matrix_shape(layer)[1]


@dataclass(frozen=True)
class Head(Grouped):
    """The weights of an attention head in a projection are active together.

    A head is a range of outputs in query, key and value projections, and a range of inputs in the output projection. Each
    projection chooses its heads separately. All other layers stay dense.

    Attributes:
        heads: Number of heads, a divisor of the width.
        rows: Names or shell-style patterns of layers whose heads are ranges of outputs.
        columns: Names or shell-style patterns of layers whose heads are ranges of inputs.
    """

    heads: int = 4
    rows: Sequence[str] = ("*in_proj*", "*q_proj*", "*k_proj*", "*v_proj*", "*query*", "*key*", "*value*", "*qkv*")
    columns: Sequence[str] = ("*out_proj*", "*attention.output*", "*attention.out*")

    def __post_init__(self) -> None:
        check_positive(heads=self.heads)
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "columns", tuple(self.columns))

    def unsupported_reason(self, layer: SparseLayer) -> str | None:
        """See ``Pattern``."""
        outputs, inputs = matrix_shape(layer)
        if self._is(layer, self.columns):
            size = inputs
        elif self._is(layer, self.rows):
            size = outputs
        else:
            return "no attention projection"
        return f"{self.heads} heads do not divide {size}" if size % self.heads else None

    def _is(self, layer: SparseLayer, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, p) for name in (layer.label, layer.parameter) for p in patterns)

    def arrange(self, layer: SparseLayer, tensor: Tensor, absent: float = 0) -> Tensor:
        """See ``Grouped``."""
        matrix = matrix_of(layer, tensor)
        if self._is(layer, self.columns):
            matrix = matrix.t()
        return matrix.reshape(1, self.heads, -1)

    def _elements(self, layer: SparseLayer) -> int:
        return layer.weights // self.heads


@dataclass(frozen=True)
class Diagonal(Grouped):
    """The weights of a wrapped diagonal of the weight matrix are active together.

    This is the structure of DynaDiag (Tyagi et al. 2025, https://arxiv.org/abs/2506.11449). Diagonal d of a wide matrix has
    the positions (i, (i + d) mod inputs), that of a tall one ((j + d) mod outputs, j). There are as many diagonals as the
    longer side has entries, each as long as the shorter side; together they cover the matrix.
    """

    def arrange(self, layer: SparseLayer, tensor: Tensor, absent: float = 0) -> Tensor:
        """See ``Grouped``."""
        matrix = matrix_of(layer, tensor)
        if matrix.shape[0] > matrix.shape[1]:
            matrix = matrix.t()
        short, long = matrix.shape
        # In two copies side by side, no diagonal wraps around.
        twice = torch.cat([matrix, matrix], 1)
        return twice.as_strided((1, long, short), (0, 1, 2 * long + 1))

    def _elements(self, layer: SparseLayer) -> int:
        return min(matrix_shape(layer))
