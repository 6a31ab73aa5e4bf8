"""Narrower dense models with as many weights, or as many FLOPs, as a sparse one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dst.errors import ConfigurationError
from dst.method import Narrow
from dst.metrics.counting import Example, layer_macs
from dst.topology.layers import Selector, find_layers

_HALVINGS = 16


@dataclass(frozen=True)
class Narrowed:
    """A narrower model.

    Attributes:
        width_factor: The width factor to build the model with, in (0, 1].
        share: Its share of the full-size model's weights (or MACs), in (0, 1]. Widths are integers, so this is close to the
            density and seldom equal to it.
    """

    width_factor: float
    share: float


def narrow(
    make: Callable[..., nn.Module],
    density: float,
    match: str = "parameters",
    *,
    example: Example | None = None,
    include: Iterable[Selector] | None = None,
    exclude: Iterable[Selector] | None = None,
) -> Narrowed:
    """Find the ``width_factor`` at which a dense model matches a sparse one of full size.

    ```python
    make = partial(dst.models.LeNet300100, (1, 28, 28), 10)
    model = make(width_factor=narrow(make, 0.1).width_factor)
    ```

    The factor multiplies all hidden widths. It is found by bisection, to 2⁻¹⁶. Of the closest models above and below the
    density, the result is the one nearer to it, or the smaller one if both are equally near. Models are built on the meta
    device: nothing is allocated, and random generators do not advance.

    Args:
        make: Builds the model from the keyword argument ``width_factor``; 1 is full size.
        density: Share of the full-size model that the narrow one should have, in (0, 1].
        match: ``"parameters"`` counts the weights that would be sparse (see `dst.topology.layers.find_layers`), ``"flops"`` their
            MACs in inference, for one sample.
        example: An input of the model, as in `dst.metrics.layer_macs`; only ``"flops"`` needs it.
        include: The weights that count, by name, pattern or module type; all that can be sparse by default.
        exclude: Weights that do not count.

    Returns:
        The width factor and its share.

    Raises:
        ConfigurationError: A model that takes no ``width_factor``, cannot be built on the meta device, or does not become
            narrow enough; a setting out of range.
    """
    Narrow(density, match)  # checks both
    if match == "flops" and example is None:
        raise ConfigurationError('match="flops" measures MACs: pass an example of the input')
    check_takes_width_factor(make)
    include, exclude = (None if s is None else list(s) for s in (include, exclude))

    def cost(factor: float) -> int:
        model = build_on_meta(make, factor)
        layers, _ = find_layers(model, include, exclude)
        if match == "parameters":
            return sum(layer.weights for layer in layers)
        assert example is not None
        macs = layer_macs(model, example)
        return sum(macs.get(name, 0) for name in {layer.parameter for layer in layers})

    full = cost(1.0)
    if density == 1:
        return Narrowed(1.0, 1.0)
    below, above = 2.0**-_HALVINGS, 1.0
    least, most = cost(below), full
    if least > density * full:
        raise ConfigurationError(
            f"density={density:g} is less than {_name(make)} has at its narrowest, {least / full:.4g} of its {match}: use "
            "a larger density or a larger model" + ("; its width_factor changes nothing" if least == full else "")
        )
    for _ in range(_HALVINGS):
        middle = (below + above) / 2
        found = cost(middle)
        if found <= density * full:
            below, least = middle, found
        else:
            above, most = middle, found
    nearer = most - density * full < density * full - least
    return Narrowed(above, most / full) if nearer else Narrowed(below, least / full)


def build_on_meta(make: Callable[..., nn.Module], factor: float) -> nn.Module:
    """Build a model on the meta device, without values. Random generators do not advance.

    Raises:
        ConfigurationError: The model cannot be built, on the meta device or at all.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return make(width_factor=factor)
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"{_name(make)} cannot be built with width_factor={factor:.6g} on the meta device, where its size is measured: "
            f"{type(error).__name__}: {error}"
        ) from error


def check_takes_width_factor(make: Callable[..., Any]) -> None:
    """Raise ConfigurationError if ``make`` does not take the keyword argument ``width_factor``."""
    parameters = inspect.signature(make).parameters
    if "width_factor" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    raise ConfigurationError(
        f"{_name(make)} takes no width_factor, by which a dense model is made narrower: give it a parameter "
        "width_factor: float = 1.0 that multiplies its hidden widths (dst.models do so), or set its size by hand and train "
        "it with sparsity=dense"
    )


def _name(make: Callable[..., Any]) -> str:
    return getattr(getattr(make, "func", make), "__name__", type(make).__name__)
