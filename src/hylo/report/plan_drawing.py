"""Figure 6, first half: the plan, layer by layer: what each became, its parameters, and what it remembers."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hylo.report.drawing import FILL, MUTED, PAPER, ink_on
from hylo.report.names import LETTERS, MIXERS, count
from hylo.report.readings import Report


def plan_figure(report: Report) -> Figure | None:
    """The layers from input to output: what each became, its parameters, and what it remembers of a full context."""
    layers = report.get("plan", {}).get("layers")
    if not layers:
        return None
    plan, tokens = report["plan"], report.get("l_long") or 1
    with_cache = all("kv_bytes_per_token" in layer for layer in layers)
    heights = [0.42, 1.5, 1.5] if with_cache else [0.42, 1.5]
    figure = Figure(figsize=(11.0, 1.2 + 1.15 * sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    at = [layer["index"] for layer in layers]
    colours = [MIXERS[layer["mixer"]].colour for layer in layers]

    strip = figure.add_subplot(grid[0])
    strip.bar(at, 1, width=0.94, color=colours)
    size = 9.5 if len(layers) <= 24 else 6.5
    place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size, "weight": "bold"}
    for layer, colour in zip(layers, colours, strict=True):
        strip.text(layer["index"], 0.5, LETTERS[layer["mixer"]], color=ink_on(colour), **place)
    strip.set_axis_off()
    strip.set_title(f"{report['layout']}: {len(layers)} layers, from input to output")

    parameters = figure.add_subplot(grid[1], sharex=strip)
    whole = np.array([layer["parameters"] for layer in layers], float)
    mixers = np.array([layer.get("mixer_parameters", layer["parameters"]) for layer in layers], float)
    parameters.bar(at, mixers, width=0.72, color=colours)
    parameters.bar(at, whole - mixers, bottom=mixers, width=0.72, color=FILL)
    parameters.set_ylabel("parameters")
    parameters.yaxis.set_major_formatter(FuncFormatter(lambda y, _: count(y) if y else "0"))
    parameters.set_title("Parameters of a layer")

    if with_cache:
        cache = figure.add_subplot(grid[2], sharex=strip)
        kv = np.array([layer["kv_bytes_per_token"] * tokens for layer in layers], float)
        state = np.array([layer.get("state_bytes_per_sequence", 0) for layer in layers], float)
        base = plan["base_kv_bytes_per_token"] * tokens / len(layers)
        size, unit = next(
            (size, unit)
            for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
            if base >= size
        )
        cache.bar(at, kv / size, width=0.72, color=colours)
        cache.bar(at, state / size, width=0.72, color=PAPER, edgecolor=colours, hatch="////", linewidth=0.8)
        cache.axhline(base / size, color=MUTED, linestyle="--", linewidth=1.2)
        cache.annotate(
            "base", (1, base / size), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=8.5, color=MUTED,
        )  # fmt: skip
        cache.set_ylabel(unit)
        cache.set_title(f"Memory of a layer for one sequence of {tokens:,} tokens")
    for axes in figure.axes[1:]:
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(axis="x", length=0)
    bottom = figure.axes[-1]
    bottom.set_xticks(at if len(at) <= 40 else at[::4])
    bottom.set_xlabel("layer index")
    for axes in figure.axes[1:-1]:
        axes.tick_params(labelbottom=False)
    strip.set_xlim(at[0] - 0.6, at[-1] + 0.6)

    kinds = [kind for kind in MIXERS if any(layer["mixer"] == kind for layer in layers)]
    legend = [Patch(color=MIXERS[kind].colour, label=MIXERS[kind].label) for kind in kinds]
    legend.append(Patch(color=FILL, label="MLP and norms, copied"))
    if with_cache and state.any():
        legend.append(Patch(facecolor=PAPER, edgecolor=MUTED, hatch="////", label="recurrent state, any length"))
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend))
    return figure
