"""The figure of a selection: every layer's score, with its error, and the choice beside the even spread."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hylo.layout import is_attention_like, parse_layout
from hylo.report.drawing import INK, MUTED, Drawing, drawn_as
from hylo.report.names import LETTERS, MIXERS

SCORES = {
    "kl": "KL that attention saves\n(nats per token)",
    "window": "damage by a window\n(nats per token)",
    "gates": "gate of attention",
}
BARS: dict[str, Any] = {"ecolor": INK, "elinewidth": 1.1, "capsize": 2.5, "fmt": "none", "zorder": 4}


def draw_selection(selection: Mapping[str, Any]) -> Drawing | None:
    """Of what selection.json says; None where no layer was scored."""
    return drawn_as("selection", partial(_figure, selection)) if selection["scores"] else None


def _figure(selection: Mapping[str, Any]) -> Figure:
    compared = selection.get("comparison")
    width = max(5.6, min(8.6, 3.4 + 0.26 * selection["layers"]))
    figure = Figure(figsize=(width + (3.6 if compared else 0), 3.7), layout="constrained")
    grid = figure.add_gridspec(1, 3 if compared else 1, width_ratios=[width, 1.5, 1.5] if compared else [1])
    mixers = parse_layout(selection["layout"], selection["layers"], selection["chosen"])
    _scores(figure.add_subplot(grid[0]), selection, mixers)
    if compared:
        colours = [MIXERS[next(filter(is_attention_like, mixers))].colour, MUTED]
        _compared(figure.add_subplot(grid[1]), compared, "kl", "KL to the base", "nats per token", colours)
        _compared(figure.add_subplot(grid[2]), compared, "needle", "Needle", "answers recalled (%)", colours)
    kinds = dict.fromkeys(sorted(mixers, key=is_attention_like, reverse=True))
    handles: list[Any] = [
        Patch(color=MIXERS[kind].colour, label=f"{'stays' if is_attention_like(kind) else 'becomes'} {LETTERS[kind]}")
        for kind in kinds
    ]
    handles.append(Line2D([], [], color=MUTED, marker="^", linestyle="", label="the even spread's layers"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _scores(axes: Axes, selection: Mapping[str, Any], mixers: list[str]) -> None:
    scores, method = selection["scores"], selection["method"]
    at = [score["layer"] for score in scores]
    heights = [score["score"] for score in scores]
    axes.bar(at, heights, width=0.72, color=[MIXERS[mixers[i]].colour for i in at], zorder=3)
    axes.errorbar(at, heights, [score["error"] or 0.0 for score in scores], **BARS)
    axes.axhline(0, color=MUTED, linewidth=0.8, zorder=3)
    own = [i for i in selection["uniform"] if i in at]
    axes.plot(own, [-0.035] * len(own), "^", color=MUTED, markersize=6, transform=axes.get_xaxis_transform(),
              clip_on=False, zorder=5)  # fmt: skip
    order = f", {selection['order']}" if selection.get("order") else ""
    axes.set_title(f"{selection['layout']} by {method}{order}")
    axes.set_ylabel(SCORES[method])
    axes.set_xlabel("layer index")
    axes.set_xticks(range(selection["layers"]) if selection["layers"] <= 40 else range(0, selection["layers"], 4))
    axes.set_xlim(-0.7, selection["layers"] - 0.3)
    axes.tick_params(axis="x", length=0, pad=12)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", visible=False)


def _compared(axes: Axes, compared: Mapping[str, Any], measure: str, title: str, unit: str, colours: list[str]) -> None:
    """The choice beside the even spread, with standard errors."""
    times = 100 if measure == "needle" else 1
    values, errors = (
        [times * (compared[name][key] or 0.0) for name in ("chosen", "uniform")] for key in (measure, f"{measure}_se")
    )
    axes.bar([0, 1], values, width=0.62, color=colours, zorder=3)
    axes.errorbar([0, 1], values, errors, **BARS)
    places = 1 if measure == "needle" else 3
    for x, value, error in zip((0, 1), values, errors, strict=True):
        axes.annotate(f"{value:.{places}f}", (x, value + error), xytext=(0, 3), textcoords="offset points",
                      ha="center", fontsize=8.5)  # fmt: skip
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_xticks([0, 1], ["chosen", "even"])
    axes.set_xlim(-0.6, 1.6)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.14)
    axes.set_ylim(bottom=0)
    if measure == "needle":
        axes.set_ylim(0, 112)
        axes.set_yticks([0, 25, 50, 75, 100])
