"""Conventions of counting operations. Papers differ, so every figure names its convention."""

from __future__ import annotations

from dataclasses import dataclass

from dst.errors import ConfigurationError


@dataclass(frozen=True)
class Convention:
    """A rule that turns multiply-accumulates (MACs) and outputs into a number of operations.

    Attributes:
        name: Name in tables.
        per_mac: Operations per MAC, at least 1.
        per_output: Additional operations per output of a layer with weights, whatever its density.
        unit: Unit of the result.
        description: The convention in words.
    """

    name: str
    per_mac: int
    per_output: int
    unit: str
    description: str


CONVENTIONS: dict[str, Convention] = {
    c.name: c
    for c in (
        Convention(
            "macs", 1, 0, "MACs", "multiply-accumulates of weights and of products of activations; nothing else"
        ),
        Convention("flops", 2, 0, "FLOPs", "two per multiply-accumulate, as torch.utils.flop_counter; nothing else"),
        Convention(
            "rigl",
            2,
            1,
            "FLOPs",
            "n multiplications and n - 1 additions per output of n terms, one addition of a bias and one ReLU per output, "
            "whether or not the layer has them (Evci et al. 2020, https://arxiv.org/abs/1911.11134, and its published code)",
        ),
    )
}
"""Name -> convention. None counts norms, pooling, softmax, losses or the optimizer."""


def convention_of(convention: str | Convention) -> Convention:
    """Look up a convention by name. A `Convention` is returned unchanged.

    Raises:
        ConfigurationError: If there is no convention of that name.
    """
    if isinstance(convention, Convention):
        return convention
    if convention not in CONVENTIONS:
        raise ConfigurationError(f"convention={convention!r} is unknown; choose from {', '.join(CONVENTIONS)}")
    return CONVENTIONS[convention]
