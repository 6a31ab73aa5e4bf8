"""The report of a run: sections of facts, figures and tables, filled into ``templates/report.html``."""

from __future__ import annotations

from dst.metrics.flops import executed_ratio
from dst.report.charts import Axis, Line, Point, bar_chart, compact, pixel_map, point_chart
from dst.report.data import Points, RunData
from dst.report.figures import MOST_ROWS, Figure, Form, Section, Table, layers_figure, line_figure
from dst.report.summary import CONVENTION, NOT_COUNTED, Summary, number, percent, shape_text
from dst.report.templating import fill

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
"""Id to heading of every section, in the page's order. Every page has all of them."""

_SHOWN_DEGREES = 6


def render(run: RunData) -> str:
    """Make the page.

    Args:
        run: From `dst.report.gather`.

    Returns:
        HTML that refers to nothing outside itself.
    """
    sections = {
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
    # Reports are passed on: the page does not tell where the folder is on this machine.
    place = "/".join(run.folder.resolve().parts[-2:])
    summary = run.summary
    title = place
    if summary is not None:
        title = f"{summary.sparsity} at density {summary.density.target:g}, seed {summary.seed}"
    return fill("report.html", title=title, place=place, headings=SECTIONS, sections=sections)


# -- sections -----------------------------------------------------------------------------------------------------


def _summary(run: RunData) -> Section:
    summary = run.summary
    if summary is None:
        return Section(absent="The run has not ended. The page shows what it has recorded so far.")
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
    return Section(
        warnings=[f"Not counted: {line}" for line in summary.flops.uncounted],
        facts=facts,
        notes=[f"Convention {line}." for name, line in summary.costs() if name == CONVENTION],
        table=_memory(summary),
    )


def _memory(summary: Summary) -> Table | None:
    """The parts of the predicted memory, and the measured memory."""
    memory = summary.memory
    if memory is None:
        return None
    rows = [[name.replace("_", " "), f"{mib:.4g}"] for name, mib in memory.parts.items()]
    rows.append(["all, predicted", f"{memory.predicted_mib:.4g}"])
    if memory.peak_mib is not None:
        rows.append(["measured before training", f"{memory.conditions['before_mib']:.4g}"])
        rows.append(["measured peak", f"{memory.peak_mib:.4g}"])
    return Table(["memory in training", "MiB"], rows, "Memory", title="Memory in training")


def _curves(run: RunData) -> Section:
    figures = []
    for quality, ticks, numbers, low in (("accuracy", _share, percent, None), ("loss", _short, number, 0.0)):
        lines = [
            Line(split, run.metrics[f"{split}/{quality}"])
            for split in ("train", "val", "test")
            if run.metrics.get(f"{split}/{quality}")
        ]
        if lines:
            axis, caption = Axis(quality, ticks, low=low), quality.capitalize()
            figures.append(line_figure(f"{quality}-chart", caption, lines, _steps(run), axis, run.levels, numbers))
    return _figures(figures, "No accuracy or loss was logged.")


def _density(run: RunData) -> Section:
    densities = [points for points in run.layers.density if points]
    is_constant = densities and all(len({value for _, value in points}) == 1 for points in densities)
    figures = [] if is_constant else _by_layer(run, "density-chart", "Density", run.layers.density, _share)
    if any(run.layers.effective):
        caption = "Effective density: connections on a path from input to output"
        figures += _by_layer(run, "effective-chart", caption, run.layers.effective, _share)
    if is_constant:
        note = "Every layer kept its density throughout. The table of layers lists it."
        return Section(notes=[note], figures=figures)
    return _figures(figures, "No topology was recorded.")


def _topology(run: RunData) -> Section:
    figures = []
    for key, caption in (
        ("churn", "Churn: share of the active weights that an update has grown"),
        ("exploration_rate", "Exploration: share of the weights that were ever active"),
        ("loss_spike", "Loss after updates: relative rise above the mean before"),
    ):
        points = run.topology[key]
        lines = [Line("churn" if key == "churn" else caption.partition(":")[0].lower(), points)]
        if key == "churn":
            lines.append(Line("drop fraction", run.topology["drop_fraction"]))
        if points:
            axis = Axis(key, _share, low=None if key == "loss_spike" else 0.0)
            figures.append(line_figure(f"{key}-chart", caption, lines, _steps(run), axis, run.levels, percent))
    return _figures(figures, "The topology was not updated.")


def _dead(run: RunData) -> Section:
    figures = [
        *_by_layer(run, "dead-outputs-chart", "Outputs without a connection", run.layers.dead_outputs, compact),
        *_by_layer(run, "dead-inputs-chart", "Inputs without a connection", run.layers.dead_inputs, compact),
    ]
    return _figures(figures, "No masks were recorded.")


def _degrees(run: RunData) -> Section:
    figures = []
    for i, (name, histogram) in enumerate(zip(run.layers.names, run.in_degrees, strict=False)):
        first, width, counts = histogram["first"], histogram["width"], histogram["counts"]
        title = f"{name}: connections that enter an output"
        axis, units = Axis("connections", compact), Axis("outputs", compact, low=0.0)
        chart = bar_chart(f"degrees-{i}", title, first, width, counts, axis, units)
        rows = [[f"{first + j * width} to {first + (j + 1) * width - 1}", f"{n:,}"] for j, n in enumerate(counts)]
        figures.append(Figure(name, chart, numbers=Table(["connections", "outputs"], rows, name)))
    if not figures:
        return Section(absent="Not known before the run has ended.")
    return Section(figures=figures[:_SHOWN_DEGREES], more_figures=figures[_SHOWN_DEGREES:])


def _input(run: RunData) -> Section:
    if run.picture is None:
        return Section(absent="Not known: the run has not ended, or no sparse layer reads the input.")
    counts = run.picture["counts"]
    kernel = run.picture["kind"] == "kernel"
    title = "Connections by place in the kernel" if kernel else "Connections by pixel"
    note = "The first layer is a convolution, which visits every pixel." if kernel else "Channels are summed."
    rows = [[str(i), *map(str, row)] for i, row in enumerate(counts)]
    header = ["row", *(str(i) for i in range(len(counts[0])))]
    numbers = Table(header, rows, title) if len(counts) <= MOST_ROWS and len(header) <= MOST_ROWS else None
    return Section(figures=[Figure(f"{title}. {note}", pixel_map("input-chart", title, counts), numbers=numbers)])


def _flops(run: RunData) -> Section:
    summary = run.summary
    if summary is None or summary.test.accuracy is None:
        return Section(absent="Not known before the run has ended with a finite accuracy.")
    accuracy, executed = summary.test.accuracy, _executed(run, summary)
    points = [
        Point("theoretical", summary.flops.inference_ratio, accuracy),
        Point("executed", executed, accuracy, series=1),
    ]
    room = max(0.02, 0.5 * (1 - accuracy))
    axes = (
        Axis("inference FLOPs, relative to dense", _share, low=0.0, high=1.0),
        Axis("test accuracy", percent, low=max(0.0, accuracy - room), high=min(1.0, accuracy + room)),
    )
    caption = "Test accuracy against inference FLOPs"
    rows = [[point.name, percent(point.x), percent(point.y)] for point in points]
    if executed == 1 and summary.flops.inference_ratio < 1:
        note = (
            f"The {run.backend} backend multiplies by its zeros: the hardware executes the dense network's operations."
        )
    elif executed < 1:
        note = f"The {run.backend} backend skips zeros."
    else:
        note = "Nothing is sparse."
    numbers = Table(["inference FLOPs", "of dense", "test accuracy"], rows, "FLOPs")
    chart = point_chart("flops-chart", caption, points, *axes)
    return Section(figures=[Figure(f"{caption}. {note}", chart, numbers=numbers)])


def _layers(run: RunData) -> Section:
    if run.summary is not None:
        layers = [(x["name"], x["shape"], x["weights"], x["density"]) for x in run.summary.density.layers]
    else:
        newest = [points[-1][1] if points else 1.0 for points in run.layers.density]
        layers = list(zip(run.layers.names, run.layers.shapes, run.layers.weights, newest, strict=True))
    if not layers:
        return Section(absent="No topology was recorded.")
    dead = {
        name: (inputs[-1][1] if inputs else None, outputs[-1][1] if outputs else None)
        for name, inputs, outputs in zip(run.layers.names, run.layers.dead_inputs, run.layers.dead_outputs, strict=True)
    }
    header = ["layer", "shape", "weights", "active", "density", "dead inputs", "dead outputs"]
    rows = []
    for name, shape, weights, density in layers:
        units = ["not known" if n is None else f"{n:.0f}" for n in dead.get(name, (None, None))]
        active = f"{round(density * weights):,}"
        rows.append([name, shape_text(shape), f"{weights:,}", active, f"{density:.4f}", *units])
    return Section(table=Table(header, rows, "layers", kind="stacked"))


def _config(run: RunData) -> Section:
    if not run.config:
        return Section(absent="The folder has no settings (.hydra/config.yaml).")
    return Section(code=run.config)


# -- parts --------------------------------------------------------------------------------------------------------


def _figures(figures: list[Figure], absent: str) -> Section:
    return Section(figures=figures) if figures else Section(absent=absent)


def _by_layer(run: RunData, key: str, caption: str, series: list[Points], form: Form) -> list[Figure]:
    lines = [Line(name, points) for name, points in zip(run.layers.names, series, strict=True) if points]
    if not lines:
        return []
    return [layers_figure(key, caption, lines, _steps(run), Axis(caption, form, low=0.0), run.levels, form)]


def _steps(run: RunData) -> Axis:
    """The axis of optimizer steps, the same for every chart: from 0 to the last step that anything was recorded at."""
    curves = [*run.metrics.values(), *run.topology.values(), *run.layers.density, *run.layers.dead_outputs]
    last = max((points[-1][0] for points in curves if points), default=None)
    return Axis("optimizer steps", compact, low=0.0, high=last)


def _executed(run: RunData, summary: Summary) -> float:
    recorded = summary.flops.executed_ratio
    return executed_ratio(summary.flops.inference_ratio, run.backend) if recorded is None else recorded


def _share(value: float) -> str:
    return f"{100 * value:.3g}%"


def _short(value: float) -> str:
    return f"{value:.3g}"
