"""Figure 1: a short score against the long one, by length; models of published tables beside those measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hylo.report.drawing import MUTED, PAPER
from hylo.report.labels import Point, label_points
from hylo.report.measures import Estimate
from hylo.report.names import Look, looks, short_length
from hylo.report.readings import RULER_TASKS, SHORT, Report, cells_of, chosen_short, ruler_label, short_scores

PANELS = 4  # at most
HOLLOW: dict[str, Any] = {"markerfacecolor": PAPER, "markeredgecolor": MUTED, "markeredgewidth": 1.2}
BARS: dict[str, Any] = {"fmt": "none", "elinewidth": 1, "capsize": 3}


def short_long_figure(report: Report) -> Figure | None:
    """A short score against mean RULER, a panel a length; quoted models hollow, numbered and named below."""
    suite = chosen_short(report)
    if suite is None:
        return None
    long, own = cells_of(report, "ruler"), looks(report)
    short = {name: score for name, score in short_scores(report, suite).items() if name in long}
    lengths = spread(sorted({length for name in short for length in long[name]}, key=int), PANELS)
    quoted = [row for row in report.get("published") or [] if row.get(suite) is not None]
    quoted = [row for row in quoted if any(length in row["ruler"] for length in lengths)]
    columns = min(2, len(lengths))
    rows = -(-len(lengths) // columns)
    below = 0.2 * (-(-len(quoted) // columns) + 1) if quoted else 0
    figure = Figure(figsize=(1.2 + 4.4 * columns, 0.4 + 3.4 * rows + below), layout="constrained")
    first: Axes | None = None
    for i, length in enumerate(lengths):
        axes = figure.add_subplot(rows, columns, i + 1, sharex=first, sharey=first)
        first = first or axes
        axes.set_title(f"RULER at {short_length(int(length))} tokens")
        for row in quoted:
            if length in row["ruler"]:
                axes.plot(row[suite], row["ruler"][length], "o", markersize=6, clip_on=False, **HOLLOW)
        for name, score in short.items():
            if length in long[name]:
                _point(axes, score, long[name][length], own[name])
        axes.set_ylim(0, 100)
        axes.margins(x=0.15)
        axes.set_xlim(left=max(0, axes.get_xlim()[0]))
        if i >= len(lengths) - columns:
            axes.set_xlabel(f"{SHORT[suite]} (%)")
        if i % columns == 0:
            axes.set_ylabel(f"{ruler_label(report)} (%)")
    if quoted:
        _key(figure, quoted, columns)
    figure.draw_without_rendering()  # places are known from here on
    figure.set_layout_engine("none")
    for axes, length in zip(figure.axes, lengths, strict=True):
        points = [
            Point(x.value, y.value, own[name].label, x.error or 0, y.error or 0)
            for name, x in short.items()
            if (y := long[name].get(length))
        ]
        points += [
            Point(row[suite], row["ruler"][length], str(number), reach=3, size=7)
            for number, row in enumerate(quoted, 1)
            if length in row["ruler"]
        ]
        label_points(axes, points)
    return figure


def _point(axes: Axes, x: Estimate, y: Estimate, look: Look) -> None:
    style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "markeredgecolor": PAPER}
    axes.errorbar(x.value, y.value, y.error, x.error, ecolor=look.colour, zorder=4, **BARS)
    axes.plot(x.value, y.value, linestyle="none", markersize=9, zorder=5, clip_on=False, **style)


def _key(figure: Figure, quoted: Sequence[Mapping[str, Any]], columns: int) -> None:
    source = next((row["source"] for row in quoted if "source" in row), "published tables")
    names = [f"{number}  {row['model']}" for number, row in enumerate(quoted, 1)]
    figure.legend(
        [Line2D([], [], linestyle="none") for _ in quoted],
        names,
        loc="outside lower center",
        ncols=columns,
        title=f"hollow: quoted from {source}, {RULER_TASKS} tasks; not measured here",
        handlelength=0,
        handletextpad=0,
        fontsize=8.5,
        title_fontsize=9,
    )


def spread(values: Sequence[str], at_most: int) -> list[str]:
    """`at_most` of them, the first and the last among these."""
    if len(values) <= at_most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (at_most - 1))] for i in range(at_most)]
