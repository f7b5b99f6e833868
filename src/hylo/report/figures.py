"""The figures of a report, each drawn from the report's dictionary alone; a figure without data is left out."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hylo.report.drawing import Drawing, drawn_as, log_axis
from hylo.report.names import LETTERS, MIXERS, count, metric, short_length, stage_look

MAIN_STAGES = ("teacher", "converted", "aligned", "extended", "control")
CURVE_POINTS = 250  # drawn of a training curve; each is the mean of the steps it stands for
Report = dict[str, Any]


def draw_figures(report: Report) -> dict[str, Drawing]:
    """All figures by name: result (for a README), lengths, plan, depth, training."""
    figures: dict[str, Callable[[Report], Figure | None]] = {
        "result": result_figure,
        "lengths": lengths_figure,
        "plan": plan_figure,
        "depth": depth_figure,
        "training": training_figure,
    }
    drawn = {}
    for name, draw in figures.items():
        if (drawing := drawn_as(name, partial(draw, report))) is not None:
            drawn[name] = drawing
    return drawn


def result_figure(report: Report) -> Figure | None:
    """Needle accuracy and KL by length, side by side, for the stages that tell the story."""
    chosen = [stage for stage in report["stages"] if stage["name"] in MAIN_STAGES] or report["stages"]
    return _by_length(report, chosen, ("needle", "kl"), (9.0, 3.7))


def lengths_figure(report: Report) -> Figure | None:
    """Needle accuracy, KL and perplexity by length, for every stage."""
    return _by_length(report, report["stages"], ("needle", "kl", "perplexity"), (11.0, 3.9))


def _by_length(
    report: Report, stages: list[dict[str, Any]], names: Sequence[str], size: tuple[float, float]
) -> Figure | None:
    names = [name for name in names if any(metric(stage, name) for stage in stages)]
    if not names:
        return None
    titles = {
        "needle": ("Needle accuracy", "answers recalled (%)"),
        "kl": ("Divergence from the teacher", "KL (nats per token)"),
        "perplexity": ("Perplexity on held-out text", "perplexity"),
    }
    figure = Figure(figsize=(size[0] * len(names) / (2 if size[0] < 10 else 3), size[1]), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), i + 1)
        axes.set_title(titles[name][0])
        axes.set_ylabel(titles[name][1])
        _length_axis(axes, report)
        for stage in stages:
            values, look = metric(stage, name), stage_look(stage["name"])
            points = [(x, values[str(n)]) for x, n in enumerate(report["lengths"]) if str(n) in values]
            points = [(x, y) for x, y in points if math.isfinite(y) and (name == "needle" or y > 0)]
            if not points:
                continue
            at, heights = np.array(points, float).T
            front = 4 if stage["name"] == "extended" else 3
            if name == "needle":
                heights *= 100
                errors = [100 * metric(stage, "needle_se").get(str(report["lengths"][int(x)]), 0.0) for x in at]
                axes.errorbar(
                    at, heights, errors, fmt="none", ecolor=look.colour, elinewidth=1, capsize=2, zorder=front
                )
            axes.plot(
                at,
                heights,
                label=look.label,
                color=look.colour,
                marker=look.marker,
                linestyle=look.line,
                linewidth=1.8,
                markersize=6,
                markeredgecolor="white",
                markeredgewidth=0.6,
                clip_on=False,
                zorder=front,
            )
        if name == "needle":
            axes.set_ylim(0, 100)
        else:
            log_axis(axes)
    handles, labels = [], []
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    order = [stage_look(stage["name"]).label for stage in stages]
    pairs = sorted(zip(handles, labels, strict=True), key=lambda pair: order.index(pair[1]))
    figure.legend(*zip(*pairs, strict=True), loc="outside lower center", ncols=len(labels), handlelength=2.6)
    return figure


def _length_axis(axes: Axes, report: Report) -> None:
    """One evenly spaced place for every length; the lengths of training are named and marked."""
    lengths = report["lengths"]
    tags = {report.get("l_short"): "\nL_short", report.get("l_long"): "\nL_long"}
    axes.set_xticks(range(len(lengths)), [short_length(n) + tags.get(n, "") for n in lengths])
    axes.set_xlim(-0.35, len(lengths) - 0.65)
    axes.set_xlabel("context length (tokens)")
    axes.grid(axis="x", visible=False)
    for at, length in enumerate(lengths):
        if length in tags:
            axes.axvline(at, color="#c8c8c8", linewidth=1, linestyle=(0, (2, 3)), zorder=1)


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
    looks = [MIXERS[layer["mixer"]] for layer in layers]
    colours = [look.colour for look in looks]

    strip = figure.add_subplot(grid[0])
    strip.bar(at, 1, width=0.94, color=colours)
    size = 9.5 if len(layers) <= 24 else 6.5
    for layer, look in zip(layers, looks, strict=True):
        place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size, "weight": "bold", "color": look.ink}
        strip.text(layer["index"], 0.5, LETTERS[layer["mixer"]], **place)
    strip.set_axis_off()
    strip.set_title(f"{report['layout']}: {len(layers)} layers, from input to output")

    parameters = figure.add_subplot(grid[1], sharex=strip)
    whole = np.array([layer["parameters"] for layer in layers], float)
    mixers = np.array([layer.get("mixer_parameters", layer["parameters"]) for layer in layers], float)
    parameters.bar(at, mixers, width=0.72, color=colours)
    parameters.bar(at, whole - mixers, bottom=mixers, width=0.72, color="#dcdcdc")
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
        cache.bar(at, state / size, width=0.72, color="white", edgecolor=colours, hatch="////", linewidth=0.8)
        cache.axhline(base / size, color="#555555", linestyle="--", linewidth=1.2)
        cache.annotate(
            "base", (1, base / size), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=8.5, color="#555555",
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
    legend.append(Patch(color="#dcdcdc", label="MLP and norms, copied"))
    if with_cache and state.any():
        legend.append(Patch(facecolor="white", edgecolor="#555555", hatch="////", label="recurrent state, any length"))
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend))
    return figure


def depth_figure(report: Report) -> Figure | None:
    """Needle accuracy by length and depth: teacher, finished hybrid and control side by side."""
    stages = [stage for stage in report["stages"] if metric(stage, "needle_depth")]
    stages = [stage for stage in stages if stage["name"] in ("teacher", "extended", "control")] or stages[:3]
    if not stages:
        return None
    lengths = [n for n in report["lengths"] if any(str(n) in metric(stage, "needle_depth") for stage in stages)]
    bins = max(len(column) for stage in stages for column in metric(stage, "needle_depth").values())
    figure = Figure(figsize=(1.4 + 3.2 * len(stages), 3.9), layout="constrained")
    image = None
    for i, stage in enumerate(stages):
        columns = metric(stage, "needle_depth")
        values = np.full((bins, len(lengths)), np.nan)
        for x, length in enumerate(lengths):
            column = columns.get(str(length), [])
            values[: len(column), x] = [100 * v for v in column]
        axes = figure.add_subplot(1, len(stages), i + 1)
        image = axes.pcolormesh(values, vmin=0, vmax=100, cmap="cividis", edgecolor="white", linewidth=1)
        axes.invert_yaxis()
        for y, x in np.argwhere(~np.isnan(values)) if bins * len(lengths) <= 120 else ():
            shade = "#111111" if values[y, x] > 55 else "white"
            axes.text(x + 0.5, y + 0.5, f"{values[y, x]:.0f}", ha="center", va="center", fontsize=8, color=shade)
        axes.set_title(stage_look(stage["name"]).label)
        axes.set_xticks(np.arange(len(lengths)) + 0.5, [short_length(n) for n in lengths])
        axes.set_xlabel("context length (tokens)")
        axes.tick_params(length=0)
        axes.set_yticks(np.linspace(0, bins, 5), ["0", "25", "50", "75", "100"] if i == 0 else [""] * 5)
        if i == 0:
            axes.set_ylabel("depth of the needle (% of the context)")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    assert image is not None
    figure.colorbar(image, ax=figure.axes, label="answers recalled (%)", shrink=0.9, pad=0.015).outline.set_visible(
        False
    )
    return figure


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
