"""Tables for the terminal, made with ``rich``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def terminal_table(
    rows: Iterable[Sequence[str | Text]],
    right: Collection[int] | None = None,
    *,
    whole: Collection[int] = (),
    title: str = "",
) -> Table:
    """Make a table without rules.

    Strings are shown as they are: ``rich`` reads no markup in them, since labels of layers hold brackets.

    Args:
        rows: Cells, the header first. The header consists of strings.
        right: Indices of the columns that are aligned to the right. None aligns all but the first.
        whole: Indices of the columns that are never wrapped.
        title: Shown above the table.
    """
    cells = iter(rows)
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="dim",
        box=None,
        header_style="dim",
        padding=(0, 3, 0, 0),
        pad_edge=False,
    )
    for i, name in enumerate(next(cells)):
        aligned = i > 0 if right is None else i in right
        table.add_column(name, justify="right" if aligned else "left", overflow="fold", no_wrap=i in whole)
    for row in cells:
        table.add_row(*map(_text, row))
    return table


def terminal_facts(facts: Iterable[tuple[str, str | Text]]) -> Table:
    """Make a grid of names and values."""
    grid = Table.grid(padding=(0, 3))
    grid.add_column(style="dim")
    grid.add_column()
    for name, value in facts:
        grid.add_row(name, _text(value))
    return grid


def show(renderable: Any) -> None:
    """Print a ``rich`` renderable. Where no terminal sets a width, lines may have 160 characters."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(renderable, highlight=False)


def _text(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)
