r"""Diagnostics of masks: density, churn, exploration, overlap, N:M conformance, fan-in.

All functions are pure. Classes that accumulate over steps and processes are in ``dst.metrics.diagnostics``. Masks are bool
tensors, True where active: a tensor, a mapping of names to tensors such as ``Sparsifier.masks``, or an iterable of tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dst.errors import ConfigurationError

Masks = Tensor | Mapping[str, Tensor] | Iterable[Tensor]


def as_masks(masks: Masks) -> list[Tensor]:
    """List the tensors of ``masks``.

    Raises:
        ConfigurationError: If a mask is not a bool tensor, or there is no mask.
    """
    if isinstance(masks, Tensor):
        tensors = [masks]
    elif isinstance(masks, Mapping):
        tensors = list(masks.values())
    else:
        tensors = list(masks)
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ConfigurationError(f"a mask must be a bool tensor, got {found}; pass weights as weight != 0")
    if not tensors:
        raise ConfigurationError("there are no masks to look at")
    return tensors


def paired_masks(first: Masks, second: Masks) -> list[tuple[Tensor, Tensor]]:
    """Pair masks of the same layers.

    Raises:
        ConfigurationError: If names or shapes differ.
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        if first.keys() != second.keys():
            raise ConfigurationError(f"masks of different layers: {', '.join(sorted(first.keys() ^ second.keys()))}")
        second = [second[name] for name in first]
    a, b = as_masks(first), as_masks(second)
    if [t.shape for t in a] != [t.shape for t in b]:
        raise ConfigurationError(
            f"masks of different shapes: {[tuple(t.shape) for t in a]} and {[tuple(t.shape) for t in b]}"
        )
    return [(x, y.to(x.device)) for x, y in zip(a, b, strict=True)]


def ratio(numerator: int, denominator: int, empty: float = 0.0) -> Tensor:
    """The quotient as a float32 scalar; ``empty`` if the denominator is 0."""
    return torch.tensor(numerator / denominator if denominator else empty)


def density_counts(masks: Masks) -> tuple[int, int]:
    """Number of active weights and of all weights; see `mask_density`."""
    tensors = as_masks(masks)
    return sum(int(t.sum()) for t in tensors), sum(t.numel() for t in tensors)


def mask_density(masks: Masks) -> Tensor:
    r"""Share of active weights.

    .. math:: d = \frac{\sum_l |M_l|}{\sum_l N_l}

    Args:
        masks: Bool tensors of any shape.

    Returns:
        Scalar in [0, 1].

    Raises:
        ConfigurationError: If a mask is not a bool tensor.

    Example:
        >>> import torch
        >>> from dst.metrics import mask_density
        >>> mask_density({"a": torch.tensor([True, False]), "b": torch.tensor([True, False, False, False])})
        tensor(0.3333)
    """
    return ratio(*density_counts(masks))


def churn_counts(before: Masks, after: Masks) -> tuple[int, int]:
    """Number of new and of all active weights; see `mask_churn`."""
    pairs = paired_masks(before, after)
    return sum(int((y & ~x).sum()) for x, y in pairs), sum(int(y.sum()) for _, y in pairs)


def mask_churn(before: Masks, after: Masks) -> Tensor:
    r"""Share of the active weights that an update has grown.

    .. math:: c = \frac{\sum_l |M'_l \setminus M_l|}{\sum_l |M'_l|}

    Args:
        before: Masks M before an update.
        after: Masks M' of the same layers after the update.

    Returns:
        Scalar in [0, 1]; 0 if no weight is active.

    Raises:
        ConfigurationError: If names or shapes differ, or a mask is not a bool tensor.

    Example:
        >>> import torch
        >>> from dst.metrics import mask_churn
        >>> mask_churn(torch.tensor([True, True, False]), torch.tensor([True, False, True]))
        tensor(0.5000)
    """
    return ratio(*churn_counts(before, after))


def exploration_rate(history: Iterable[Masks]) -> Tensor:
    r"""In-time over-parameterization (ITOP) rate: share of the weights of sparse layers that were ever active.

    .. math:: R = \frac{\sum_l |\bigcup_t M_l^t|}{\sum_l N_l}

    Layers that are dense in the last masks count in neither term. Source: Liu et al. 2021, "Do We Actually Need Dense
    Over-Parameterization?", https://arxiv.org/abs/2102.02887.

    Args:
        history: Masks of the same layers at successive steps, at least one.

    Returns:
        Scalar in [0, 1]; 1 if all layers are dense.

    Raises:
        ConfigurationError: If there are no masks, names or shapes differ, or a mask is not a bool tensor.

    Example:
        >>> import torch
        >>> from dst.metrics import exploration_rate
        >>> exploration_rate([torch.tensor([True, False, False, False]), torch.tensor([False, True, False, False])])
        tensor(0.5000)
    """
    union: list[Tensor] = []
    last: Masks | None = None
    for masks in history:
        masks = masks if isinstance(masks, (Tensor, Mapping)) else list(masks)
        if last is None:
            union = [mask.clone() for mask in as_masks(masks)]
        else:
            union = [total | mask for total, (_, mask) in zip(union, paired_masks(last, masks), strict=True)]
        last = masks
    if last is None:
        raise ConfigurationError("there are no masks to look at")
    return ratio(*explored_counts(union, as_masks(last)), empty=1.0)


def explored_counts(union: Iterable[Tensor], last: Iterable[Tensor]) -> tuple[int, int]:
    """Number of weights ever active and of all weights, without dense layers; see `exploration_rate`."""
    sparse = [u for u, mask in zip(union, last, strict=True) if not bool(mask.all())]
    return sum(int(u.sum()) for u in sparse), sum(u.numel() for u in sparse)


def overlap_counts(first: Masks, second: Masks, over: str = "union") -> tuple[int, int]:
    """Number of shared connections and of those they are compared with; see `mask_overlap`."""
    if over not in ("union", "active"):
        raise ConfigurationError(f"over={over!r} must be 'union' (Jaccard) or 'active'")
    pairs = paired_masks(first, second)
    shared = sum(int((x & y).sum()) for x, y in pairs)
    return shared, sum(int((x | y if over == "union" else x).sum()) for x, y in pairs)


def mask_overlap(first: Masks, second: Masks, over: str = "union") -> Tensor:
    r"""Overlap of the topologies of two runs, or of two steps of one run.

    .. math:: J = \frac{\sum_l |A_l \cap B_l|}{\sum_l |A_l \cup B_l|}
        \qquad O = \frac{\sum_l |A_l \cap B_l|}{\sum_l |A_l|}

    Independent random masks of density d have O = d and J = d / (2 - d). Compare with these values, not with 0.

    Args:
        first: Masks A.
        second: Masks B of the same layers.
        over: "union" for the Jaccard index J; "active" for the share O of the connections of A that B has too.

    Returns:
        Scalar in [0, 1]; 1 if both have no connections.

    Raises:
        ConfigurationError: If names or shapes differ, a mask is not a bool tensor, or ``over`` is unknown.

    Example:
        >>> import torch
        >>> from dst.metrics import mask_overlap
        >>> a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
        >>> mask_overlap(a, b), mask_overlap(a, b, over="active")
        (tensor(0.3333), tensor(0.5000))
    """
    return ratio(*overlap_counts(first, second, over), empty=1.0)


def nm_counts(masks: Masks, n: int, m: int, dim: int = 1) -> tuple[int, int]:
    """Number of windows that conform and of all windows; see `nm_conformance`."""
    if not 1 <= n <= m:
        raise ConfigurationError(f"N:M needs 1 <= N <= M, got {n}:{m}")
    conform = total = 0
    for mask in as_masks(masks):
        if not -mask.ndim <= dim < mask.ndim:
            raise ConfigurationError(f"a mask of shape {tuple(mask.shape)} has no dimension {dim} for N:M windows")
        inputs = mask.movedim(dim, -1).long()
        padded = torch.nn.functional.pad(inputs, (0, -inputs.shape[-1] % m))
        active = padded.unflatten(-1, (-1, m)).sum(-1)
        conform += int((active <= n).sum())
        total += active.numel()
    return conform, total


def nm_conformance(masks: Masks, n: int, m: int, dim: int = 1) -> Tensor:
    r"""Share of the windows of M consecutive inputs that have at most N active weights.

    .. math:: C = \frac{1}{W} \sum_w [\, |M_w| \le N \,]

    Args:
        masks: Bool tensors of shape (out, in, ...).
        n: Largest number N of active weights in a window, 1 to ``m``.
        m: Length M of a window.
        dim: Dimension of the windows: input features of linear layers, input channels of convolutions. A last window
            shorter than M must conform too.

    Returns:
        Scalar in [0, 1]. Hardware support needs 1.

    Raises:
        ConfigurationError: If N or M is out of range, a mask has no such dimension, or a mask is not a bool tensor.

    Example:
        >>> import torch
        >>> from dst.metrics import nm_conformance
        >>> nm_conformance(torch.tensor([[True, False, True, False, True, True, True, False]]), n=2, m=4)
        tensor(0.5000)
    """
    return ratio(*nm_counts(masks, n, m, dim), empty=1.0)


def in_degrees(mask: Tensor, output_dim: int = 0) -> Tensor:
    r"""Fan-in of each output unit: its number of active weights.

    .. math:: k_o = \sum_i M_{oi}

    Args:
        mask: Bool tensor of shape (out, in, ...).
        output_dim: Dimension of the outputs; 1 for transposed convolutions.

    Returns:
        Int64 tensor of shape (out,).

    Raises:
        ConfigurationError: If the mask is not a bool tensor.

    Example:
        >>> import torch
        >>> from dst.metrics import in_degrees
        >>> in_degrees(torch.tensor([[True, True, False], [False, False, False]]))
        tensor([2, 0])
    """
    (mask,) = as_masks(mask)
    return mask.movedim(output_dim, 0).flatten(1).sum(1)


def in_degree_histogram(mask: Tensor, output_dim: int = 0) -> Tensor:
    r"""Histogram of the fan-in of output units.

    .. math:: h_k = |\{o : k_o = k\}|

    Args:
        mask: Bool tensor of shape (out, in, ...).
        output_dim: Dimension of the outputs.

    Returns:
        Int64 tensor of shape (fan-in + 1,): entry k counts the units with k active weights.

    Raises:
        ConfigurationError: If the mask is not a bool tensor.

    Example:
        >>> import torch
        >>> from dst.metrics import in_degree_histogram
        >>> in_degree_histogram(torch.tensor([[True, True, False], [False, False, False], [True, False, True]]))
        tensor([1, 0, 2, 0])
    """
    degrees = in_degrees(mask, output_dim)
    fan_in = mask.numel() // max(1, mask.shape[output_dim])
    return torch.bincount(degrees, minlength=fan_in + 1)
