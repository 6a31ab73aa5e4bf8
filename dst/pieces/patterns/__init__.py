"""Which weights share one bit (a *group*), and within which window a budget holds (a *scope*).

One rule serves them all. A pattern lays a layer's weights out as a table ``[scopes, groups, elements]`` of positions; a
group's score is the mean of its elements'; a first mask takes the best groups of every scope, and an update drops the
lowest groups of the layer and lets every scope grow back to its quota.

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

The network-wide scope is not a pattern but an allocation, ``dst.allocation.Global``: it splits the budget by the scores of
all layers, and combines with every pattern.
"""

from dst.pieces.patterns.fan_in import FanIn
from dst.pieces.patterns.grouped import best_per_scope
from dst.pieces.patterns.n_m import NM, TransposableNM
from dst.pieces.patterns.tiles import Block, Diagonal, Head, Neuron
from dst.pieces.patterns.unstructured import Unstructured

__all__ = ["NM", "Block", "Diagonal", "FanIn", "Head", "Neuron", "TransposableNM", "Unstructured", "best_per_scope"]
