"""Tables as text."""

from __future__ import annotations

from dst.tables import aligned_table, csv_table, markdown_table

ROWS = [("layer", "weights"), ("a|b", "1,200"), ("c*", "7")]


def test_columns_are_aligned_without_trailing_spaces():
    assert aligned_table(ROWS, right=[1]).splitlines() == ["layer  weights", "a|b      1,200", "c*           7"]
    assert aligned_table(ROWS).splitlines() == ["layer  weights", "a|b    1,200", "c*     7"]


def test_markdown_escapes_what_would_change_the_table():
    assert markdown_table(ROWS, right=[1]).splitlines() == [
        "| layer | weights |",
        "|---|---:|",
        "| a\\|b | 1,200 |",
        "| c\\* | 7 |",
    ]


def test_csv_quotes_and_leaves_none_empty():
    assert csv_table([("a,b", None, 0.1)]) == '"a,b",,0.1\n'
