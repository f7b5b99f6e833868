"""Figure 2: needles recalled by context length and depth, a map for every model, side by side."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hylo.report.drawing import ink_on
from hylo.report.names import looks, short_length
from hylo.report.readings import Report

ROW = 4  # maps beside each other, at most
NUMBERED = 120  # cells of a map, at most, that hold their number
COLOURS = matplotlib.colormaps["cividis"]


def needle_figure(report: Report) -> Figure | None:
    """Teacher, base, hybrid and baselines; what a run's stages on the way recall is left to the tables."""
    results = report["suites"].get("needle", {}).get("results", {})
    maps = {
        name: results[name]["needle_depth"] for name in report["models"] if results.get(name, {}).get("needle_depth")
    }
    chosen = [name for name in maps if report["models"][name]["role"] != "stage"] or list(maps)
    if not chosen:
        return None
    own = looks(report)
    lengths = sorted({int(length) for name in chosen for length in maps[name]})
    bins = max(len(column) for name in chosen for column in maps[name].values())
    columns, rows = min(ROW, len(chosen)), -(-len(chosen) // ROW)
    cell = max(0.42, 2.3 / len(lengths))
    figure = Figure(figsize=(1.5 + columns * (0.25 + cell * len(lengths)), 0.5 + rows * 3.2), layout="constrained")
    for i, name in enumerate(chosen):
        axes = figure.add_subplot(rows, columns, i + 1)
        image = _map(axes, maps[name], lengths, bins)
        axes.set_title(fitted(own[name].label, cell * len(lengths)))
        axes.set_xticks(np.arange(len(lengths)) + 0.5, [short_length(n) for n in lengths])
        axes.set_yticks(np.linspace(0, bins, 5), ["0", "25", "50", "75", "100"] if i % columns == 0 else [""] * 5)
        if i + columns >= len(chosen):
            axes.set_xlabel("context length (tokens)")
        if i % columns == 0:
            axes.set_ylabel("depth of the needle (%)")
    bar = figure.colorbar(image, ax=figure.axes, label="answers recalled (%)", shrink=0.9, pad=0.015)
    bar.outline.set_visible(False)
    return figure


def fitted(name: str, width: float) -> str:
    """A title broken at its slashes where `width` in inches is too little for it."""
    return name if len(name) * 0.095 <= width else name.replace("/", "/\n")


def _map(axes: Axes, by_length: dict[str, list[float]], lengths: list[int], bins: int) -> Any:
    values = np.full((bins, len(lengths)), np.nan)
    for x, length in enumerate(lengths):
        column = by_length.get(str(length), [])
        values[: len(column), x] = [np.nan if share is None else 100 * share for share in column]
    image = axes.pcolormesh(values, vmin=0, vmax=100, cmap=COLOURS, edgecolor="white", linewidth=1)
    axes.invert_yaxis()
    for y, x in np.argwhere(~np.isnan(values)) if values.size <= NUMBERED else ():
        ink = ink_on(COLOURS(values[y, x] / 100))
        axes.text(x + 0.5, y + 0.5, f"{values[y, x]:.0f}", ha="center", va="center", fontsize=8, color=ink)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return image
