"""A table of all methods, derived from their compositions and docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

from dst import methods
from dst.errors import ConfigurationError
from dst.method import BACKENDS, Method
from dst.pieces.protocols import waits_for_batch

COLUMNS = ("sparsity=", "storage", "growth", "pattern", "dense gradient", "paper")
_DENSITIES = (0.1, 0.5, 1.0)  # of the examples: not every pattern supports every density


def catalogue() -> list[tuple[str, ...]]:
    """Return one row for each method of ``dst.methods``, in the order of ``COLUMNS``.

    - storage: the backends that support the method with its defaults.
    - growth: the grow score; ``none`` if nothing grows.
    - dense gradient: the steps that need the gradient of inactive weights, and so cost more than their sparse part:
      ``never``, ``first step``, ``every ΔT``, ``until the mask``, ``while dense``, ``always``.
    - paper: the first link in the function's docstring.
    """
    return [_row(name, getattr(methods, name)) for name in methods.__all__]


def _row(name: str, make: Callable[..., Method]) -> tuple[str, ...]:
    method = _example(make)
    link = re.search(r"https?://(?:arxiv\.org/abs/)?([^\s),;]+)", inspect.getdoc(make) or "")
    paper = "" if link is None else link.group(1) if "://arxiv" not in link.group(0) else f"arXiv:{link.group(1)}"
    return (name.rstrip("_"), ", ".join(_storages(make, method)), growth(method), _pattern(method), cost(method), paper)


def _example(make: Callable[..., Method], **settings: str) -> Method:
    for density in _DENSITIES:
        try:
            return make(density, **settings)
        except ConfigurationError as error:
            refused = error
    raise refused


def _storages(make: Callable[..., Method], method: Method) -> list[str]:
    if "backend" not in inspect.signature(make).parameters:
        return [method.backend]
    found: dict[str, None] = {}
    for backend in BACKENDS:
        if backend == "auto":
            continue  # it chooses one of the others for each layer
        try:
            found[make(method.density, backend=backend).backend] = None
        except ConfigurationError:
            continue
    return list(found)


def growth(method: Method) -> str:
    """Return the grow score in words."""
    return "none" if method.grow is None else _words(method.grow)


def _words(piece: object) -> str:
    inner = getattr(piece, "score", None)
    return _split(type(piece).__name__) + (f" {_words(inner)}" if inner is not None else "")


def _split(name: str) -> str:
    """Return ``SignedMagnitude`` as ``signed magnitude``; names with digits stay."""
    return name if any(c.isdigit() for c in name) or name.isupper() else re.sub(r"(?<!^)(?=[A-Z])", " ", name).lower()


def _pattern(method: Method) -> str:
    return _split(type(method.pattern).__name__)


def cost(method: Method) -> str:
    """Return the steps that need the gradient of inactive weights."""
    if method.density == 1 and method.lottery is None:
        return "always"  # all weights are active
    if method.lottery is not None:
        return "until the mask"
    scores = method.scores().values()
    if method.moves_inactive or any(score.observes and score.needs_gradient for score in scores):
        return "always"
    if method.schedule is not None and method.density_at(0, 1_000) == 1:
        return "while dense"
    if method.is_dynamic and any(score.needs_gradient for score in scores):
        return "every ΔT"
    if method.sparsify_at != 0:
        return "until the mask"
    return "first step" if waits_for_batch(method.init) else "never"
