"""Patterns: which weights share one bit of the mask (a *group*), and within which window a budget holds (a *scope*).

A pattern arranges the positions of a layer as a table ``[scopes, groups, elements]``. The score of a group is the mean of
its weights' scores. The first mask takes the best groups of every scope. An update drops the lowest groups of the layer,
then grows every scope to its quota.

| pattern | scope | group |
|---|---|---|
| ``Unstructured`` | layer | one weight |
| ``Block`` | layer | a tile of the weight matrix |
| ``Neuron`` | layer | all inputs of one output (neuron or channel) |
| ``Head`` | layer | the rows (or columns) of one attention head |
| ``Diagonal`` | layer | a wrapped diagonal |
| ``FanIn`` | output row | one weight |
| ``NM`` | M consecutive inputs | one weight |
| ``TransposableNM`` | an M×M tile | one weight, N in every row and column |

One budget for the whole network is an allocation, not a pattern: ``dst.allocation.Global`` splits the budget by the scores
of all layers. It combines with every pattern whose density is free.
"""

from dst.pieces.patterns.fan_in import FanIn
from dst.pieces.patterns.grouped import best_per_scope
from dst.pieces.patterns.n_m import NM, TransposableNM
from dst.pieces.patterns.tiles import Block, Diagonal, Head, Neuron
from dst.pieces.patterns.unstructured import Unstructured

__all__ = ["NM", "Block", "Diagonal", "FanIn", "Head", "Neuron", "TransposableNM", "Unstructured", "best_per_scope"]
