"""Lines: the scores of every model by context length, and the losses of training by tokens."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hylo.report.drawing import FAINT, PAPER, log_axis
from hylo.report.measures import Measure, measures
from hylo.report.names import Look, count, looks, short_length, stage_look
from hylo.report.readings import Report, ruler_label
from hylo.report.scores import BARS

MAIN = ("teacher", "converted", "aligned", "extended", "control")  # of a run's stages, that tell its story
CURVE_POINTS = 250  # drawn of a training curve; each is the mean of the steps it stands for


TITLES = {
    "mean RULER": "RULER",
    "needle accuracy": "Needle accuracy",
    "KL to the teacher": "Divergence from the teacher",
    "perplexity": "Perplexity on held-out text",
}
LABELS = {
    "needle accuracy": "answers recalled (%)",
    "KL to the teacher": "KL (nats per token)",
    "perplexity": "perplexity",
}


def result_figure(report: Report) -> Figure | None:
    """The long score and KL by length, side by side, for the models that tell the story."""
    found = {measure.title: measure for measure in measures(report)}
    long = "mean RULER" if "mean RULER" in found else "needle accuracy"
    main = [name for name in report["models"] if name in MAIN or report["models"][name]["role"] == "baseline"]
    panels = [found[title] for title in (long, "KL to the teacher") if title in found]
    return _panels(report, panels, [name for name in main if name != "no_alignment"] or list(report["models"]))


def lengths_figure(report: Report) -> Figure | None:
    """Mean RULER, needle accuracy, KL and perplexity by length, for every model."""
    panels = [measure for title in TITLES for measure in measures(report) if measure.title == title]
    return _panels(report, panels, list(report["models"]))


def _panels(report: Report, panels: Sequence[Measure], names: Sequence[str]) -> Figure | None:
    """A panel for each measure, a line for each of the models `names`."""
    panels = [measure for measure in panels if any(name in measure.cells for name in names)]
    if not panels:
        return None
    own = looks(report)
    columns = len(panels) if len(panels) < 4 else 2
    rows = -(-len(panels) // columns)
    width = {1: 5.2, 2: 9.4, 3: 11.0}[columns]
    figure = Figure(figsize=(width, 0.5 + 3.3 * rows), layout="constrained")
    for i, measure in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.set_title(TITLES[measure.title])
        axes.set_ylabel(LABELS.get(measure.title) or f"{ruler_label(report)} (%)")
        lengths = [int(key) for key in measure.keys]
        _length_axis(axes, lengths, report)
        for name in names:
            _line(axes, measure, name, lengths, own[name], front=name == report["hybrid"])
        if measure.unit == "%":
            axes.set_ylim(0, 100)
        else:
            log_axis(axes)
    _legend(figure, [own[name].label for name in names], width)
    return figure


def _line(axes: Axes, measure: Measure, name: str, lengths: list[int], look: Look, front: bool) -> None:
    cells = {int(key): cell for key, cell in measure.cells.get(name, {}).items()}
    points = [(x, cells[n].value, cells[n].error or 0.0) for x, n in enumerate(lengths) if n in cells]
    points = [point for point in points if math.isfinite(point[1]) and (measure.unit == "%" or point[1] > 0)]
    if not points:
        return
    at, heights, errors = zip(*points, strict=True)
    order = 4 if front else 3
    style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "markeredgecolor": PAPER}
    axes.errorbar(at, heights, errors, ecolor=look.colour, zorder=order, **BARS)
    axes.plot(
        at,
        heights,
        label=look.label,
        linestyle=look.line,
        linewidth=1.8,
        markersize=6,
        markeredgewidth=0.6,
        clip_on=False,
        zorder=order,
        **style,
    )


def _length_axis(axes: Axes, lengths: list[int], report: Report) -> None:
    """One evenly spaced place for every length; the lengths of training are named and marked."""
    tags = {report.get("l_short"): "\nL_short", report.get("l_long"): "\nL_long"}
    axes.set_xticks(range(len(lengths)), [short_length(n) + tags.get(n, "") for n in lengths])
    axes.set_xlim(-0.35, len(lengths) - 0.65)
    axes.set_xlabel("context length (tokens)")
    axes.grid(axis="x", visible=False)
    for at, length in enumerate(lengths):
        if length in tags:
            axes.axvline(at, color=FAINT, linewidth=1, linestyle=(0, (2, 3)), zorder=1)


def _legend(figure: Figure, order: list[str], width: float) -> None:
    """Every name once, in as many columns as the width in inches has room for."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    names = sorted(handles, key=order.index)
    column = 0.85 + 0.075 * max(map(len, names))
    figure.legend(
        [handles[name] for name in names],
        names,
        loc="outside lower center",
        ncols=max(1, min(len(names), int(width / column))),
        handlelength=2.6,
    )


def training_figure(report: Report) -> Figure | None:
    """Loss against tokens; stages of one length ("extend 512", "control 512") share a panel."""
    panels: dict[str, list[tuple[str, list[dict[str, Any]]]]] = {}
    losses: dict[str, str] = {}
    for name, steps in (report.get("training") or {}).items():
        steps = [step for step in steps if math.isfinite(step.get("loss", math.nan))]
        stem, _, length = name.rpartition(" ")
        title = f"Extension at {int(length):,} tokens" if length.isdigit() else stage_look(name).label
        if steps:
            title = {"align": "Alignment", "Align": "Alignment"}.get(title, title)
            panels.setdefault(title, []).append((stem or name, steps))
            if name in report.get("losses", {}):
                losses[title] = report["losses"][name]
    if not panels:
        return None
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(11.0 if columns > 1 else 6.0, 2.9 * rows), layout="constrained")
    for i, (title, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        for name, steps in curves:
            look = stage_look(name if len(curves) > 1 or name != "align" else "aligned")
            tokens, loss = _thinned(steps)
            axes.plot(tokens, loss, color=look.colour, linestyle=look.line, linewidth=1.6, label=look.label)
        axes.set_title(title)
        distance = "loss (L2 distance)" if title == "Alignment" else "KL to the teacher (nats/token)"
        axes.set_ylabel(losses.get(title, distance))
        axes.set_xlabel("tokens trained on" if "tokens" in curves[0][1][0] else "steps")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x) if x else "0"))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlim(left=0)
        log_axis(axes)
        if len(curves) > 1:
            axes.legend(fontsize=8.5)
    return figure


def _thinned(steps: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """At most CURVE_POINTS points, each the mean of consecutive steps."""
    parts = np.array_split(np.arange(len(steps)), min(CURVE_POINTS, len(steps)))
    at = [steps[part[-1]].get("tokens", steps[part[-1]].get("step", part[-1] + 1)) for part in parts]
    return at, [float(np.mean([steps[i]["loss"] for i in part])) for part in parts]
