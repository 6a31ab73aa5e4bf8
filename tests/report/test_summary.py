"""The summary as a table."""

from __future__ import annotations

from dst.report.summary import Density, Flops, Quality, Summary, Topology
from dst.report.terminal import show


def test_labels_with_brackets_are_shown_whole(capsys):
    layer = {"name": "attention.in_proj_weight[q]", "shape": [8, 8], "weights": 64, "nonzero": 16, "density": 0.25}
    summary = Summary(
        "rigl", 0, 10, 1.0, Density(0.25, 0.25, [layer]), Quality(0.5, 1.0), Flops(0.25, 0.25), Topology(1, 0.5)
    )
    show(summary.renderable())
    assert "attention.in_proj_weight[q]" in capsys.readouterr().out
