"""The report's page: sections of figures, each with its numbers as a table behind it."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import TypeAlias

from dst.metrics.flops import executed_ratio
from dst.report.charts import (
    MOST_LINES,
    Axis,
    Line,
    bar_chart,
    compact,
    heat_map,
    line_chart,
    pixel_map,
    point_chart,
    thin,
)
from dst.report.data import Points, RunData
from dst.report.summary import CONVENTION, NOT_COUNTED, Summary, number, percent

SECTIONS = {
    "summary": "Summary",
    "curves": "Accuracy and loss",
    "density": "Density by layer",
    "topology": "Churn and exploration",
    "dead": "Dead units",
    "degrees": "In-degrees",
    "input": "What the first layer looks at",
    "flops": "FLOPs and accuracy",
    "layers": "Layers",
    "config": "Settings",
}
"""Id to heading of every section, in the page's order; all of them are on every page."""

Form: TypeAlias = Callable[[float], str]
"""Turns a number into text."""

_ROWS = 60
_SHOWN_DEGREES = 6


def render(run: RunData) -> str:
    """Make the page.

    Args:
        run: From `dst.report.gather`.

    Returns:
        HTML that refers to nothing outside itself.
    """
    bodies = {
        "summary": _summary(run),
        "curves": _curves(run),
        "density": _density(run),
        "topology": _topology(run),
        "dead": _dead(run),
        "degrees": _degrees(run),
        "input": _input(run),
        "flops": _flops(run),
        "layers": _layers(run),
        "config": _config(run),
    }
    place = "/".join(run.folder.resolve().parts[-2:])  # not where it lies on a machine: reports are passed on
    summary = run.summary
    title = place
    if summary is not None:
        title = f"{summary.sparsity} at density {summary.density.target:g}, seed {summary.seed}"
    links = "".join(f'<li><a href="#{key}">{heading}</a></li>' for key, heading in SECTIONS.items())
    sections = "".join(
        f'<section id="{key}" aria-labelledby="{key}-heading"><h2 id="{key}-heading">{heading}</h2>{bodies[key]}</section>'
        for key, heading in SECTIONS.items()
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{_head(title)}</head><body>'
        f"<header><h1>{_text(title)}</h1><p>{_text(place)}</p></header>"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav><main>{sections}</main></body></html>\n'
    )


# -- sections -----------------------------------------------------------------------------------------------------


def _summary(run: RunData) -> str:
    summary = run.summary
    if summary is None:
        return _none("The run has not ended: what follows is what it has recorded so far.")
    weights, active = (sum(layer[key] for layer in summary.density.layers) for key in ("weights", "nonzero"))
    facts = [
        ("test accuracy", percent(summary.test.accuracy)),
        ("tested", summary.selection),
        ("test loss", number(summary.test.loss)),
        ("density", f"{summary.density.realised:.6g} (target {summary.density.target:.6g})"),
        ("active weights", f"{active:,} of {weights:,}"),
        ("inference FLOPs, theoretical", f"{percent(summary.flops.inference_ratio)} of dense"),
        ("inference FLOPs, executed", f"{percent(_executed(run, summary))} of dense"),
        ("training FLOPs, theoretical", f"{percent(summary.flops.training_ratio)} of dense"),
        *(
            [("training FLOPs, executed", f"{percent(summary.flops.training_executed_ratio)} of dense")]
            if summary.flops.training_executed_ratio is not None
            else []
        ),
        ("topology updates", f"{summary.topology.updates:,}"),
        ("explored", f"{percent(summary.topology.exploration_rate)} of the weights"),
        ("training", f"{summary.steps:,} steps in {summary.seconds:.1f} s"),
        ("seed", str(summary.seed)),
        ("backend", run.backend),
        *(fact for fact in summary.costs() if fact[0] not in (CONVENTION, NOT_COUNTED)),
    ]
    warned = "".join(f'<p class="warning">Not counted: {_text(line)}</p>' for line in summary.flops.uncounted)
    rule = "".join(
        f'<p class="none">Convention {_text(line)}.</p>' for name, line in summary.costs() if name == CONVENTION
    )
    listed = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts)
    return f"{warned}<dl>{listed}</dl>{rule}{_memory(summary)}"


def _memory(summary: Summary) -> str:
    """The prediction's parts beside what was measured."""
    memory = summary.memory
    if memory is None:
        return ""
    rows = [[name.replace("_", " "), f"{mib:.4g}"] for name, mib in memory.parts.items()]
    rows.append(["all, predicted", f"{memory.predicted_mib:.4g}"])
    if memory.peak_mib is not None:
        rows.append(["measured before training", f"{memory.conditions['before_mib']:.4g}"])
        rows.append(["measured peak", f"{memory.peak_mib:.4g}"])
    table = _table(["memory in training", "MiB"], rows, "Memory")
    return f"<details><summary>Memory in training</summary>{table}</details>"


def _curves(run: RunData) -> str:
    figures = []
    for quality, form, high in (("accuracy", percent, 1.0), ("loss", lambda v: f"{v:.3g}", None)):
        lines = [
            Line(split, run.metrics[f"{split}/{quality}"])
            for split in ("train", "val", "test")
            if run.metrics.get(f"{split}/{quality}")
        ]
        if lines:
            low = 0.0 if high is None else None
            axis = Axis(quality, _share if high else form, low=low)
            chart = line_chart(f"{quality}-chart", quality.capitalize(), lines, _steps(run), axis, run.levels)
            figures.append(_figure(chart, quality.capitalize(), lines, form if high else number))
    return _figures(figures, "No accuracy or loss was logged.")


def _steps(run: RunData) -> Axis:
    """The axis of optimizer steps, the same for every chart: from 0 to the last step that anything was recorded at."""
    curves = [*run.metrics.values(), *run.topology.values(), *run.layers.density, *run.layers.dead_outputs]
    return Axis(
        "optimizer steps", compact, low=0.0, high=max((points[-1][0] for points in curves if points), default=None)
    )


def _density(run: RunData) -> str:
    densities = [points for points in run.layers.density if points]
    is_constant = densities and all(len({value for _, value in points}) == 1 for points in densities)
    note = "<p>Every layer kept its density throughout; the table of layers has them.</p>" if is_constant else ""
    figures = [] if is_constant else [_by_layer(run, "density-chart", "Density", run.layers.density, _share, low=0.0)]
    if any(run.layers.effective):
        title = "Effective density: connections on a path from input to output"
        figures.append(_by_layer(run, "effective-chart", title, run.layers.effective, _share, low=0.0))
    return note + (_figures(figures, "No topology was recorded.") if figures else "")


def _topology(run: RunData) -> str:
    figures = []
    for key, title in (
        ("churn", "Churn: new among the active connections, at every update"),
        ("exploration_rate", "Exploration: weights that were ever active"),
        ("loss_spike", "Loss after updates: its rise above the mean before"),
    ):
        points = run.topology[key]
        lines = [Line("churn" if key == "churn" else title.partition(":")[0].lower(), points)]
        if key == "churn":
            lines.append(Line("drop fraction", run.topology["drop_fraction"]))
        if points:
            low = None if key == "loss_spike" else 0.0
            chart = line_chart(f"{key}-chart", title, lines, _steps(run), Axis(key, _share, low=low), run.levels)
            figures.append(_figure(chart, title, lines, percent))
    return _figures(figures, "The topology was not updated.")


def _dead(run: RunData) -> str:
    figures = [
        _by_layer(run, "dead-outputs-chart", "Outputs without a connection", run.layers.dead_outputs, compact, low=0.0),
        _by_layer(run, "dead-inputs-chart", "Inputs without a connection", run.layers.dead_inputs, compact, low=0.0),
    ]
    return _figures(figures, "Masks were not looked at.")


def _degrees(run: RunData) -> str:
    figures = []
    for i, (name, histogram) in enumerate(zip(run.layers.names, run.in_degrees, strict=False)):
        first, width, counts = histogram["first"], histogram["width"], histogram["counts"]
        title = f"{name}: connections that enter an output"
        axis, units = Axis("connections", compact), Axis("outputs", compact, low=0.0)
        chart = bar_chart(f"degrees-{i}", title, first, width, counts, axis, units)
        rows = [[f"{first + j * width} to {first + (j + 1) * width - 1}", f"{n:,}"] for j, n in enumerate(counts)]
        figures.append(_framed(chart, name, "", _details(["connections", "outputs"], rows, name)))
    if not figures:
        return _none("Not known before the run has ended.")
    shown, rest = figures[:_SHOWN_DEGREES], figures[_SHOWN_DEGREES:]
    more = f"<details><summary>{len(rest)} more layers</summary>{_figures(rest, '')}</details>" if rest else ""
    return _figures(shown, "") + more


def _input(run: RunData) -> str:
    if run.picture is None:
        return _none("Not known: the run has not ended, or no sparse layer reads the input.")
    counts = run.picture["counts"]
    kernel = run.picture["kind"] == "kernel"
    title = "Connections by place in the kernel" if kernel else "Connections by pixel"
    note = "The first layer is a convolution, which visits every pixel." if kernel else "Channels are summed."
    rows = [[str(i), *map(str, row)] for i, row in enumerate(counts)]
    header = ["row", *(str(i) for i in range(len(counts[0])))]
    details = _details(header, rows, title) if len(counts) <= _ROWS and len(header) <= _ROWS else ""
    return _figures([_framed(pixel_map("input-chart", title, counts), f"{title}. {note}", "", details)], "")


def _flops(run: RunData) -> str:
    summary = run.summary
    if summary is None or summary.test.accuracy is None:
        return _none("Not known before the run has ended with a finite accuracy.")
    accuracy, executed = summary.test.accuracy, _executed(run, summary)
    points = [("theoretical", summary.flops.inference_ratio, accuracy), ("executed", executed, accuracy)]
    room = max(0.02, 0.5 * (1 - accuracy))
    axes = (
        Axis("inference FLOPs, of the dense network's", _share, low=0.0, high=1.0),
        Axis("test accuracy", percent, low=max(0.0, accuracy - room), high=min(1.0, accuracy + room)),
    )
    chart = point_chart("flops-chart", "Test accuracy against inference FLOPs", points, *axes)
    rows = [[name, percent(ratio), percent(value)] for name, ratio, value in points]
    details = _details(["inference FLOPs", "of dense", "test accuracy"], rows, "FLOPs")
    note = (
        f"The {run.backend} backend multiplies by its zeros: the hardware executes the dense network's operations."
        if executed == 1 and summary.flops.inference_ratio < 1
        else f"The {run.backend} backend skips zeros."
        if executed < 1
        else "Nothing is sparse."
    )
    return _figures([_framed(chart, f"Test accuracy against inference FLOPs. {note}", "", details)], "")


def _layers(run: RunData) -> str:
    if run.summary is not None:
        table = [(x["name"], x["shape"], x["weights"], x["density"]) for x in run.summary.density.layers]
    else:
        newest = [points[-1][1] if points else 1.0 for points in run.layers.density]
        table = list(zip(run.layers.names, run.layers.shapes, run.layers.weights, newest, strict=True))
    if not table:
        return _none("No topology was recorded.")
    dead = {
        name: (inputs[-1][1] if inputs else None, outputs[-1][1] if outputs else None)
        for name, inputs, outputs in zip(run.layers.names, run.layers.dead_inputs, run.layers.dead_outputs, strict=True)
    }
    header = ["layer", "shape", "weights", "active", "density", "dead inputs", "dead outputs"]
    rows = []
    for name, shape, weights, density in table:
        units = ["not known" if n is None else f"{n:.0f}" for n in dead.get(name, (None, None))]
        active = f"{round(density * weights):,}"
        rows.append([name, "×".join(map(str, shape)), f"{weights:,}", active, f"{density:.4f}", *units])
    return _table(header, rows, "layers", stacked=True)


def _config(run: RunData) -> str:
    if not run.config:
        return _none("The folder has no settings (.hydra/config.yaml).")
    return f"<pre>{_text(run.config)}</pre>"


# -- parts --------------------------------------------------------------------------------------------------------


def _executed(run: RunData, summary: Summary) -> float:
    recorded = summary.flops.executed_ratio
    return executed_ratio(summary.flops.inference_ratio, run.backend) if recorded is None else recorded


def _by_layer(run: RunData, key: str, title: str, series: list[Points], form: Form, low: float | None = None) -> str:
    """A line for every layer, or a row of colours where there are many."""
    lines = [Line(name, points) for name, points in zip(run.layers.names, series, strict=True) if points]
    if not lines:
        return ""
    axis = Axis(title, form, low=low)
    if len(lines) <= MOST_LINES:
        return _figure(line_chart(key, title, lines, _steps(run), axis, run.levels), title, lines, form)
    names = [line.name for line in lines]
    last = [[line.name, form(line.points[0][1]), form(line.points[-1][1])] for line in lines]
    details = _details(["layer", "first", "last"], last, title)
    return _framed(heat_map(key, f"{title} of {len(names)} layers", lines, _steps(run), axis), title, "", details)


def _figure(chart: str, caption: str, lines: Sequence[Line], form: Form) -> str:
    """A chart with its legend and its numbers."""
    keys = "".join(
        f'<li><svg viewBox="0 0 24 8" aria-hidden="true"><path class="line s{i}" d="M0 4H24"/></svg>{_text(line.name)}</li>'
        for i, line in enumerate(lines)
    )
    steps = sorted({step for line in lines for step, _ in line.points})
    chosen = [step for step, _ in thin([(step, 0.0) for step in steps], _ROWS)]
    values = [dict(line.points) for line in lines]
    rows = [[f"{step:,.0f}", *(form(v[step]) if step in v else "" for v in values)] for step in chosen]
    left_out = "" if len(chosen) == len(steps) else f"{len(chosen)} of {len(steps):,} steps, at even distances"
    details = _details(["step", *(line.name for line in lines)], rows, caption, left_out)
    legend = f'<ul class="legend">{keys}</ul>' if len(lines) > 1 or lines[0].name.lower() not in caption.lower() else ""
    return _framed(chart, caption, legend, details)


def _framed(chart: str, caption: str, legend: str, details: str) -> str:
    return f"<figure><figcaption>{_text(caption)}</figcaption>{chart}{legend}{details}</figure>"


def _figures(figures: Iterable[str], otherwise: str) -> str:
    body = "".join(figures)
    return f'<div class="figures">{body}</div>' if body else _none(otherwise)


def _details(header: Sequence[str], rows: Sequence[Sequence[str]], label: str, note: str = "") -> str:
    extra = f"<p>{_text(note)}</p>" if note else ""
    return f"<details><summary>Numbers</summary>{extra}{_table(header, rows, label)}</details>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], label: str, stacked: bool = False) -> str:
    """A table that scrolls within its place, or whose rows become lists where there is no room for columns."""
    head = "".join(f'<th scope="col" role="columnheader">{_text(cell)}</th>' for cell in header)
    body = "".join(f'<tr role="row">{"".join(_cells(header, row))}</tr>' for row in rows)
    kind = "stacked" if stacked else "scroll"
    focus = "" if stacked else ' tabindex="0"'  # what scrolls must be reachable by keyboard
    return (
        f'<div class="{kind}" role="region" aria-label="{_text(label)}, numbers"{focus}><table role="table">'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead><tbody role="rowgroup">{body}</tbody></table></div>'
    )


def _cells(header: Sequence[str], row: Sequence[str]) -> Iterator[str]:
    for i, (name, cell) in enumerate(zip_longest(header, row, fillvalue="")):
        if i:
            yield f'<td role="cell" data-label="{_text(name)}">{_text(cell)}</td>'
        else:
            yield f'<th scope="row" role="rowheader">{_text(cell)}</th>'


def _none(reason: str) -> str:
    return f'<p class="none">{_text(reason)}</p>'


def _share(value: float) -> str:
    return f"{100 * value:.3g}%"


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _head(title: str) -> str:
    return (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing is loaded from anywhere, and a name that somebody chose cannot bring a script in.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f'<meta name="color-scheme" content="light dark"><title>{_text(title)}</title><style>{_STYLE}</style>'
    )


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #595959; --line: #d9d9d9; --paper: #fff; --box: #f5f5f5;
  --s0: #0b62a4; --s1: #b3420a; --s2: #00734c; --s3: #8b3a82; --s4: #8a6100; --s5: #067a8a; --s6: #a02020; --s7: #555 }
@media (prefers-color-scheme: dark) { :root { --ink: #ececec; --soft: #a8a8a8; --line: #3c3c3c; --paper: #141414;
  --box: #1f1f1f; --s0: #6cb6f5; --s1: #f59a62; --s2: #4fd3a1; --s3: #dd94d6; --s4: #e3bd50; --s5: #5fd0df;
  --s6: #f28b8b; --s7: #b8b8b8 } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 150rem;
  margin: 0 auto; padding: 1rem clamp(1rem, 3vw, 4rem); overflow-wrap: anywhere }
header, nav, dl, pre, .scroll, p { max-width: 110rem }
h1 { font-size: 1.5rem; margin: .5rem 0 0 } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem }
header p, .none, details p { color: var(--soft) } header p { margin: 0; font-size: .85rem }
a { color: var(--s0) } nav ul, .legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1rem }
nav { font-size: .9rem } nav a { display: inline-block; padding: .25rem 0 }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(45%, 15rem), 1fr)); gap: .6rem; margin: 0 }
dl div { background: var(--box); border-radius: .4rem; padding: .6rem .8rem } dt { color: var(--soft); font-size: .85rem }
dd { margin: 0; font-size: 1.05rem; font-variant-numeric: tabular-nums }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem }
figure { margin: 0; min-width: 0 } figcaption { font-size: .95rem; margin-bottom: .4rem }
figure > svg { display: block; width: 100%; height: auto; max-height: 24rem } image { image-rendering: pixelated }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink) } svg .soft { fill: var(--soft) }
.warning { border-left: 3px solid var(--s1); padding-left: .6rem; margin: 0 0 .6rem }
.grid { stroke: var(--line); fill: none } .mark { stroke: var(--soft); stroke-dasharray: 1 3; fill: none }
.line { fill: none; stroke-width: 2; stroke-linejoin: round } .bar { fill: var(--s0) }
.line.s0 { stroke: var(--s0) } .line.s1 { stroke: var(--s1); stroke-dasharray: 7 3 }
.line.s2 { stroke: var(--s2); stroke-dasharray: 2 3 } .line.s3 { stroke: var(--s3); stroke-dasharray: 9 3 2 3 }
.line.s4 { stroke: var(--s4) } .line.s5 { stroke: var(--s5); stroke-dasharray: 7 3 }
.line.s6 { stroke: var(--s6); stroke-dasharray: 2 3 } .line.s7 { stroke: var(--s7); stroke-dasharray: 9 3 2 3 }
.dot.s0 { fill: var(--s0) } .dot.s1 { fill: var(--s1) } .dot.s2 { fill: var(--s2) } .dot.s3 { fill: var(--s3) }
.dot.s4 { fill: var(--s4) } .dot.s5 { fill: var(--s5) } .dot.s6 { fill: var(--s6) } .dot.s7 { fill: var(--s7) }
.legend { margin: .4rem 0 0; font-size: .85rem } .legend svg { width: 24px; height: 8px; margin-right: .4rem }
details { margin-top: .4rem; font-size: .85rem } summary { cursor: pointer; color: var(--soft); padding: .25rem 0 }
.scroll { overflow: auto; max-height: 20rem; overflow-wrap: normal } table { border-collapse: collapse }
th, td { text-align: right; font-weight: normal; padding: .25rem .7rem; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums } thead th { color: var(--soft) } th:first-child { text-align: left; padding-left: 0 }
.stacked td { white-space: nowrap }
@media (max-width: 46rem) { .stacked :is(table, tbody, tr, td, th) { display: block } .stacked thead { display: none }
  .stacked tr { padding: .5rem 0; border-bottom: 1px solid var(--line) } .stacked :is(th, td) { border: 0; padding: .1rem 0 }
  .stacked td { display: flex; justify-content: space-between; gap: 1rem }
  .stacked td::before { content: attr(data-label); color: var(--soft) } }
pre { background: var(--box); border-radius: .4rem; padding: .8rem; font-size: .8rem; white-space: pre-wrap; margin: 0;
  columns: 22rem }
@media print { details:not([open]) { display: none } }
"""
