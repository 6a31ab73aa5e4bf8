"""Warnings about the model as a whole: weights left dense, masks over sparse weights, layers that csr cannot store."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from dst.method import Method
from dst.pieces.protocols import as_sampler
from dst.topology.layers import DenseWeight, SparseLayer

MOST = 0.5
"""The share of a model's weights that may stay dense without a warning."""
FROZEN = "frozen (requires_grad=False)"
_BY_CHOICE = ("excluded", "not included", "embedding", "tied to an embedding", "bias", "empty", "gain of weight_norm")
_SHOWN = 3
_FEW = 0.02


def left_dense(layers: Sequence[SparseLayer], dense: Sequence[DenseWeight]) -> str | None:
    """Describe what is left dense, where most of a model is and nobody chose it.

    Embeddings, gains and layers left out by include and exclude are dense by choice. Weights of unknown modules and frozen
    weights are not.

    Args:
        layers: The sparse layers.
        dense: The weights that stay dense.

    Returns:
        The share, and the largest of the weights; ``None`` where no more than ``MOST`` of the weights stay dense.
    """
    unchosen = sorted((d for d in dense if d.reason not in _BY_CHOICE), key=lambda d: -math.prod(d.shape))
    missed, sparse = sum(math.prod(d.shape) for d in unchosen), sum(layer.weights for layer in layers)
    if missed <= MOST * (missed + sparse):
        return None
    named = ", ".join(f"{d.name} ({math.prod(d.shape):,}: {d.reason})" for d in unchosen[:_SHOWN])
    more = f" and {len(unchosen) - _SHOWN} more" if len(unchosen) > _SHOWN else ""
    return (
        f"{missed / (missed + sparse):.1%} of the weights stay dense: {named}{more}; the density is that of the other "
        f"{sparse:,}. include= brings weights of unknown modules in, exclude= says that they are to be dense"
    )


def thawed(frozen: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Names of the parameters that were frozen and train now."""
    return [name for name, parameter in frozen if parameter.requires_grad]


def sparse_before(
    method: Method, layers: Sequence[SparseLayer], weight_of: Callable[[SparseLayer], Tensor]
) -> str | None:
    """Describe weights that are sparse already, where the method draws a random mask over them.

    Args:
        method: The method.
        layers: The sparse layers.
        weight_of: A layer to its weights. Layers that are all zero are ignored: they were initialised to zero.
    """
    if as_sampler(method.init) is None or method.density == 1:
        return None
    zeros = {layer.label: float((weight_of(layer) == 0).sum()) / layer.weights for layer in layers}
    found = {label: share for label, share in zeros.items() if _FEW < share < 1}
    if not found:
        return None
    label, share = max(found.items(), key=lambda item: item[1])
    return (
        f"the model was sparse before ({share:.1%} of {label} are zero), and {method.name} has drawn a new random mask over "
        "it: Sparsifier.load_state_dict goes on with a saved topology, init=dst.init.Magnitude() keeps the weights that are "
        "not zero, init=dst.init.FromFile(path) takes the masks that dst.save_masks wrote"
    )


def nothing_prepared(unsupported: Mapping[str, str | None]) -> str:
    """The warning that the csr backend stores no layer of the model.

    Args:
        unsupported: Layer label to why the backend cannot store it, or ``None`` where it can.
    """
    reasons = sorted({reason or "dst.prepare was not called" for reason in unsupported.values()})
    return f'backend="csr" stores no layer of this model as non-zeros alone, all are masked ({"; ".join(reasons)})'
