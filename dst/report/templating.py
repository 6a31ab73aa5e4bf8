"""HTML from the templates of this package."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


def fill(name: str, **values: Any) -> str:
    """Fill a template. All values are escaped, except those that the template marks as safe.

    Args:
        name: A file in ``templates``.
        values: The template's variables.
    """
    return _environment().get_template(name).render(values)


@cache
def _environment() -> Environment:
    # Imported here: a training that writes no report needs no templates.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
