"""What the methods share: the documentation of common parameters, and the composition from them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

from dst.method import Method
from dst.pieces.durations import Duration
from dst.pieces.schedules import Every

SHARED = {
    "density": "Target density, in (0, 1].",
    "initial_density": "Density at the start, in (0, 1].",
    "schedule": "Density over time; ``None`` for the cubic one from ``initial_density`` to ``density``.",
    "update_every": "ΔT, steps between topology updates.",
    "start": "First step that may update the topology.",
    "stop": "First step that may no longer update the topology.",
    "fraction": "Share of a layer's active connections that an update replaces.",
    "allocation": "How the budget is split over layers.",
    "init": "How the first mask is chosen.",
    "drop": "Drop score: the active connections with the lowest score are dropped.",
    "grow": "Grow score: the candidates with the highest score are grown.",
    "redistribute": "How budget moves between layers at an update.",
    "replace_step": "Whether an update replaces the optimizer's step.",
    "regrow_dropped": "Whether a connection dropped in this update may be grown again and keep its value.",
    "rescale_init": "Whether to scale initial weights to the active fan-in.",
    "pattern": "Which weights are active together; see ``dst.patterns``.",
    "grown_warmup": "Linear warm-up, in steps, of updates to newly grown weights.",
    "backend": '``"masked"``, ``"csr"`` or ``"auto"``: how weights are stored; see ``dst.Method``.',
}
"""Parameter to its description, for every method that does not describe it itself."""

_ENTRY = re.compile(r"^    (\w+): (.*(?:\n     .*)*)", re.MULTILINE)

M = TypeVar("M", bound=Callable[..., Method])


def documented(method: M) -> M:
    """Complete a method's docstring: its ``Args`` then describe every parameter, in the order of the signature.

    A docstring describes only what is the method's own; the rest comes from ``SHARED``.

    Raises:
        KeyError: A parameter that neither describes.
    """
    if method.__doc__ is None:  # python -OO
        return method
    text, _, rest = inspect.cleandoc(method.__doc__).partition("\n\nArgs:\n")
    own, *sections = rest.split("\n\n")
    descriptions = SHARED | dict(_ENTRY.findall(own))
    arguments = [f"    {name}: {descriptions[name]}" for name in inspect.signature(method).parameters]
    method.__doc__ = "\n\n".join([text, "\n".join(["Args:", *arguments]), *sections])
    return method


def compose(name: str, *, update_every: Duration, start: Duration, stop: Duration, **settings: Any) -> Method:
    """Build a method from the arguments of its function, passed as ``**locals()``.

    Args:
        name: The method's name.
        update_every: Of the clock.
        start: Of the clock.
        stop: Of the clock.
        settings: Fields of ``Method``.
    """
    return Method(name=name, clock=Every(update_every, start, stop), **settings)
