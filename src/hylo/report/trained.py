"""Figures 3 and 4: what the length trained at, YaRN, and the teacher's size make of the score on long contexts."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hylo.report.drawing import PAPER
from hylo.report.names import count, short_length
from hylo.report.readings import Report, long_label, long_measure
from hylo.report.scores import BARS

PANELS = 3  # the longest lengths evaluated at
STYLES = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-"),
    ("#CC79A7", "D", "--"),
    ("#1a1a1a", "v", "-"),
    ("#E69F00", "P", "--"),
)
Training = Mapping[str, Any]
Group = list[tuple[Training, str]]  # how each model was trained, and its name


def training_length_figure(report: Report) -> Figure | None:
    """Figure 3: the long score against the longest length trained at; with and without YaRN a line each."""

    def tick(training: Training) -> str:
        return short_length(training["length"])

    return _figure(report, "length", "longest length trained at (tokens)", tick)


def teacher_size_figure(report: Report) -> Figure | None:
    """Figure 4: the long score against the teacher's parameters, those trained without one at the left."""

    def tick(training: Training) -> str:
        size = training["teacher_parameters"]
        return f"{training['teacher']}\n{count(size)}" if size else "none"

    return _figure(report, "teacher_parameters", "teacher (parameters)", tick)


def comparable(report: Report, varying: str) -> dict[tuple[str, ...], Group]:
    """The hybrids that tell their training, in groups that differ in `varying` alone, two at least in each.

    Where that is the length, YaRN may be on and off in a group: figure 3 is of both. Keys: what a group has in common,
    as text. How many tokens were trained on is not asked, for it goes with the length; nor is the objective where
    teachers differ, for without one it is another.
    """
    common = ("teacher", "objective") if varying == "length" else ("length", "yarn")
    groups: dict[tuple[str, ...], Group] = {}
    for run in report.get("runs") or []:
        training = run["training"]
        if training.get(varying) is None or training.get("yarn") is None:
            continue
        layout = str(report["models"].get(run["hybrid"], {}).get("layout"))
        key = (layout, *(_said(name, training.get(name)) for name in common))
        groups.setdefault(key, []).append((training, run["hybrid"]))
    return _differing(groups, varying)


def _differing(groups: Mapping[tuple[str, ...], Group], varying: str) -> dict[tuple[str, ...], Group]:
    return {key: group for key, group in groups.items() if len({training[varying] for training, _ in group}) > 1}


def _said(key: str, value: Any) -> str:
    if key == "yarn":
        return "YaRN" if value else "no YaRN"
    if key == "length":
        return f"trained at {short_length(value)}"
    return f"{value} teacher" if key == "teacher" and value else str(value or "no teacher")


def _figure(report: Report, varying: str, label: str, tick: Callable[[Training], str]) -> Figure | None:
    groups = comparable(report, varying)
    measure = long_measure(report, [name for group in groups.values() for _, name in group])
    if measure is None:
        return None
    measured = {key: [pair for pair in group if pair[1] in measure.cells] for key, group in groups.items()}
    lines = _lines(_differing(measured, varying), varying)
    members = [pair for group in lines.values() for pair in group]
    lengths = [n for n in measure.keys if sum(n in measure.cells[name] for _, name in members) > 1][-PANELS:]
    if not lengths:
        return None
    ticks = {training[varying]: tick(training) for training, _ in sorted(members, key=lambda pair: pair[0][varying])}
    figure = Figure(figsize=(1.0 + 3.6 * max(1.4, len(lengths)), 3.8), layout="constrained")
    first: Axes | None = None
    lowest = 100.0
    for i, length in enumerate(lengths):
        axes = figure.add_subplot(1, len(lengths), i + 1, sharex=first, sharey=first)
        first = first or axes
        axes.set_title(f"evaluated at {short_length(int(length))} tokens")
        for number, (name, group) in enumerate(lines.items()):
            points = [
                (list(ticks).index(training[varying]), measure.cells[model][length])
                for training, model in group
                if length in measure.cells[model]
            ]
            lowest = min([lowest, *(score.value - 2 * (score.error or 0) for _, score in points)])
            _line(axes, points, *STYLES[number % len(STYLES)], name)
        axes.set_xticks(range(len(ticks)), list(ticks.values()))
        axes.set_xlim(-0.4, len(ticks) - 0.6)
        axes.set_xlabel(label)
        axes.grid(axis="x", visible=False)
    figure.axes[0].set_ylim(max(0, min(80, 10 * (lowest // 10))), 100)
    figure.axes[0].yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    figure.axes[0].set_ylabel(long_label(report, measure))
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(3, len(names)), handlelength=2.6)
    return figure


def _lines(groups: Mapping[tuple[str, ...], Group], varying: str) -> dict[str, Group]:
    """By name; of several groups each name says what its group has in common."""
    lines: dict[str, Group] = {}
    for key, group in groups.items():
        shared = ", ".join(key)
        for yarn in sorted({bool(training["yarn"]) for training, _ in group}, reverse=True):
            own = _said("yarn", yarn)
            if varying == "length":
                name = f"{shared}, {own}" if len(groups) > 1 else own
            else:
                name = shared
            lines[name] = [pair for pair in group if pair[0]["yarn"] == yarn]
    return lines


def _line(axes: Axes, points: list[Any], colour: str, marker: str, line: str, name: str) -> None:
    """Every run is a point; the line goes through the means of those at one place."""
    if not points:
        return
    places = sorted({x for x, _ in points})
    means = [np.mean([score.value for x, score in points if x == place]) for place in places]
    axes.plot(places, means, linestyle=line, color=colour, linewidth=1.8, zorder=3)
    for x, score in points:
        axes.errorbar(x, score.value, score.error, ecolor=colour, zorder=4, **BARS)
    xs, ys = zip(*((x, score.value) for x, score in points), strict=True)
    style: dict[str, Any] = {"color": colour, "marker": marker, "markeredgecolor": PAPER, "markersize": 6}
    axes.plot(xs, ys, linestyle="none", clip_on=False, zorder=5, **style)
    axes.plot([], [], linestyle=line, label=name, linewidth=1.8, **style)
