"""Tables as text: aligned columns, Markdown, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Sequence
from typing import Any


def aligned_table(rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """Format rows as columns of plain text, two spaces apart.

    Args:
        rows: Cells, the header first. All rows have the same length.
        right: Indices of the columns that are aligned to the right.

    Returns:
        One line per row, without trailing spaces.
    """
    lines = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)


def markdown_table(rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """Format rows as a Markdown table. Bars and stars within cells are escaped.

    Args:
        rows: Cells, the header first.
        right: Indices of the columns that are aligned to the right.
    """
    cells = [[cell.replace("|", "\\|").replace("*", "\\*") for cell in row] for row in rows]
    rule = "|" + "|".join("---:" if i in right else "---" for i in range(len(cells[0]))) + "|"
    header, *lines = ("| " + " | ".join(row) + " |" for row in cells)
    return "\n".join([header, rule, *lines])


def csv_table(rows: Iterable[Iterable[Any]]) -> str:
    """Format rows as CSV with Unix line ends. None becomes an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
