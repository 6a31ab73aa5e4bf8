"""What the methods share: the documentation of common parameters, and the composition from them."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from typing import Any, TypeVar, cast

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
    """Complete a method: its docstring, and ``None`` (``null`` in YAML) in the place of a piece, which is the default.

    A docstring describes only what is the method's own; the rest comes from ``SHARED``, so that ``Args`` describes every
    parameter in the order of the signature.

    Raises:
        KeyError: A parameter that neither describes.
    """
    parameters = inspect.signature(method).parameters
    pieces = {name for name, parameter in parameters.items() if is_dataclass(parameter.default)}

    @functools.wraps(method)
    def made(*args: Any, **settings: Any) -> Method:
        return method(*args, **{k: v for k, v in settings.items() if v is not None or k not in pieces})

    _complete_docstring(made, parameters)
    return cast(M, made)


def _complete_docstring(method: Callable[..., Method], parameters: Iterable[str]) -> None:
    if method.__doc__ is None:  # python -OO
        return
    text, _, rest = inspect.cleandoc(method.__doc__).partition("\n\nArgs:\n")
    own, *sections = rest.split("\n\n")
    descriptions = SHARED | dict(_ENTRY.findall(own))
    arguments = [f"    {name}: {descriptions[name]}" for name in parameters]
    method.__doc__ = "\n\n".join([text, "\n".join(["Args:", *arguments]), *sections])


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
