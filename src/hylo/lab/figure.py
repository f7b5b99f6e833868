"""A comparison as figures: every arm's mean and seeds, its differences from the baseline, and lines where arms lie on
an axis."""

import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from hylo.lab.compare import BETTER, ERRORS, SAME, WORSE, Comparison, Metric, Summary
from hylo.lab.table import headed
from hylo.report.drawing import INK, MUTED, PAPER, Drawing, drawn_as
from hylo.report.names import count, short_length
from hylo.report.trained import STYLES

LOOKS = {BETTER: ("#0072B2", "o"), WORSE: ("#D55E00", "s"), SAME: ("#7a7a7a", "D")}
ROW, COLUMN, NAMES = 0.4, 3.0, 30  # inches an arm, inches a metric, letters of a line of an arm's label
BELOW = 0.24  # of its row's height, where an arm's seeds are
COLUMNS = 3
Summaries = Mapping[str, Mapping[str, Summary]]


def draw_lab(comparison: Comparison) -> dict[str, Drawing]:
    """Figures by name: arms, differences, and lines where arms have an x; one without data is left out."""
    makers = {
        "arms": partial(arms_figure, comparison),
        "differences": partial(differences_figure, comparison),
        "lines": partial(lines_figure, comparison),
    }
    return {name: drawing for name, make in makers.items() if (drawing := drawn_as(name, make)) is not None}


def arms_figure(comparison: Comparison) -> Figure | None:
    """A panel a metric, an arm a row: seeds faint, mean and two standard errors, the baseline's mean a line."""
    return _rows_figure(comparison, comparison.summaries, list(comparison.view.arms))


def differences_figure(comparison: Comparison) -> Figure | None:
    """As `arms_figure`, of the differences from the baseline seed by seed, which is what the verdicts are of."""
    return _rows_figure(comparison, comparison.differences, list(comparison.differences), differences=True)


def lines_figure(comparison: Comparison) -> Figure | None:
    """A panel a metric: means over the arms' x, a line for each of their `line`, with two standard errors."""
    view = comparison.view
    placed = {name: arm for name, arm in view.arms.items() if arm.x is not None and comparison.summaries[name]}
    if len({arm.x for arm in placed.values()}) < 2:
        return None
    metrics = [metric for metric in view.metrics if any(metric.key in comparison.summaries[name] for name in placed)]
    figure, panels = _panels(len(metrics), height=3.1)
    lines = list(dict.fromkeys(arm.line for arm in placed.values()))
    for axes, metric in zip(panels, metrics, strict=True):
        axes.set_title(_title(metric))
        for number, line in enumerate(lines):
            members = sorted((arm.x or 0.0, name) for name, arm in placed.items() if arm.line == line)
            points = [(x, s) for x, name in members if (s := comparison.summaries[name].get(metric.key))]
            _line(axes, points, metric, line, *STYLES[number % len(STYLES)])
        beside = comparison.summaries[view.baseline].get(metric.key)
        if view.baseline not in placed and beside:
            label = view.called(view.baseline)
            axes.axhline(metric.scale * beside.mean, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.1, label=label)
        _x_axis(axes, sorted({arm.x or 0.0 for arm in placed.values()}))
        axes.set_xlabel(view.axis)
    handles, names = panels[0].get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), handlelength=2.6)
    return figure


def _rows_figure(
    comparison: Comparison, shown: Summaries, names: Sequence[str], differences: bool = False
) -> Figure | None:
    view = comparison.view
    metrics = [metric for metric in view.metrics if any(metric.key in shown[name] for name in names)]
    if not metrics:
        return None
    labels = ["\n".join(textwrap.wrap(view.called(name), NAMES)) for name in names]
    lines = sum(max(1.0, 0.62 * (label.count("\n") + 1)) for label in labels)
    widest = max(len(line) for label in labels for line in label.split("\n"))
    figure, panels = _panels(len(metrics), height=0.75 + ROW * lines, left=0.075 * widest)
    for i, (axes, metric) in enumerate(zip(panels, metrics, strict=True)):
        axes.set_title(_title(metric))
        for row, name in enumerate(names):
            if metric.key in shown[name]:
                verdict = _verdict(comparison, name, metric)
                _row(axes, row, shown[name][metric.key], metric.scale, *LOOKS.get(verdict, (INK, "o")))
        baseline = comparison.summaries[view.baseline].get(metric.key)
        line = 0.0 if differences else metric.scale * baseline.mean if baseline else None
        if line is not None:
            axes.axvline(line, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
        axes.set_ylim(len(names) - 0.4, -0.5)
        axes.set_yticks(range(len(names)), labels if i % _columns(len(metrics)) == 0 else [""] * len(names))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.margins(x=0.08)
        if differences:
            axes.set_xlabel(f"difference from {view.called(view.baseline)}")
    _key(figure, comparison, differences)
    return figure


def _row(axes: Axes, row: int, summary: Summary, scale: float, colour: str, marker: str) -> None:
    values = [scale * value for value in summary.values.values()]
    axes.plot(
        values, [row + BELOW] * len(values), "o", color=colour, alpha=0.4, markersize=4, markeredgewidth=0, zorder=2
    )
    if summary.error is not None:
        axes.errorbar(
            scale * summary.mean, row, xerr=ERRORS * scale * summary.error, ecolor=colour, fmt="none", elinewidth=1.5,
            capsize=3, zorder=3,
        )  # fmt: skip
    axes.plot(scale * summary.mean, row, marker, color=colour, markeredgecolor=PAPER, markersize=7, zorder=4)


def _line(
    axes: Axes, points: Sequence[tuple[float, Summary]], metric: Metric, name: str, colour: str, marker: str, line: str
) -> None:
    if not points:
        return
    for x, summary in points:
        values = [metric.scale * value for value in summary.values.values()]
        axes.plot([x] * len(values), values, "o", color=colour, alpha=0.4, markersize=4, markeredgewidth=0, zorder=2)
        if summary.error is not None:
            half = ERRORS * metric.scale * summary.error
            mean = metric.scale * summary.mean
            axes.errorbar(x, mean, yerr=half, ecolor=colour, fmt="none", elinewidth=1.3, capsize=3, zorder=3)
    style: dict[str, Any] = {"color": colour, "marker": marker, "markeredgecolor": PAPER, "markersize": 6.5}
    means = [metric.scale * summary.mean for _, summary in points]
    axes.plot([x for x, _ in points], means, line, label=name or None, linewidth=1.8, zorder=4, **style)


def _x_axis(axes: Axes, places: Sequence[float]) -> None:
    """Ticks where arms lie; logarithmic where these grow by factors."""
    if places[0] > 0 and places[-1] / places[0] >= 4:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(list(places)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: place(x)))
    axes.grid(axis="x", visible=False)
    axes.margins(x=0.08)


def place(x: float) -> str:
    """A tick: lengths as 2K, amounts of tokens as 120 K, else the number."""
    if x == int(x) and x >= 256 and int(x) & (int(x) - 1) == 0:
        return short_length(int(x))
    return count(x) if x >= 10_000 else f"{x:g}"


def _panels(number: int, height: float, left: float = 0.0) -> tuple[Figure, list[Axes]]:
    columns = _columns(number)
    rows = -(-number // columns)
    size = (0.4 + left + (COLUMN if number > 1 else 5.0) * columns, 0.5 + height * rows)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.12))
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(number)]


def _columns(number: int) -> int:
    return number if number <= COLUMNS else 2 if number == 4 else COLUMNS


def _title(metric: Metric) -> str:
    title = headed(metric)
    return "\n".join(textwrap.wrap(title[0].upper() + title[1:], 34))


def _verdict(comparison: Comparison, name: str, metric: Metric) -> str:
    difference = comparison.differences.get(name, {}).get(metric.key)
    return difference.verdict if difference else ""


def _key(figure: Figure, comparison: Comparison, differences: bool) -> None:
    """The verdicts that are drawn, and what the dashed line is."""
    found = {each.verdict for by in comparison.differences.values() for each in by.values()}
    handles = [
        Line2D([], [], linestyle="none", marker=marker, color=colour, markeredgecolor=PAPER, markersize=7)
        for kind, (colour, marker) in LOOKS.items()
        if kind in found
    ]
    names = [kind for kind in LOOKS if kind in found]
    if not differences:
        handles.append(Line2D([], [], linestyle=(0, (4, 3)), color=MUTED, linewidth=1.1))
        names.append(f"baseline: {comparison.view.called(comparison.view.baseline)}")
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), handletextpad=0.5)
