"""Figure 5: TTFT and TPOT by context length, a line for every model, a cross where memory ran out."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from hylo.report.drawing import MUTED, PAPER, log_axis
from hylo.report.names import Look, looks, short_length
from hylo.report.readings import Report
from hylo.serve.latency import MEASURED, OUT_OF_MEMORY

COLOURS = ("#0072B2", "#1a1a1a", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")  # Okabe and Ito's
MARKERS = ("o", "s", "^", "D", "v", "P", "h")
LINES = ("-", "--", ":", "-.")  # by concurrency
PANELS = (("ttft", "Time to first token", "seconds", 1), ("tpot", "Time per output token", "milliseconds", 1000))
SAME = ("kind", "device", "cores")  # of results that one figure may hold
Bench = Mapping[str, Any]


def latency_figures(report: Report) -> dict[str, Callable[[], Figure | None]]:
    """What draws each: `latency`, then latency_2 and so on where benches of another kind or machine are among them."""
    merged: dict[str, dict[str, Any]] = {}
    for result in report.get("latency") or []:
        found = merged.setdefault(str([result.get(key) for key in SAME]), {**result, "models": []})
        taken = [model["model"] for model in found["models"]]
        found["models"] += [model for model in result["models"] if model["model"] not in taken]
    names = ["latency" if n == 1 else f"latency_{n}" for n in range(1, len(merged) + 1)]
    own = looks(report)
    return {name: partial(latency_figure, bench, own) for name, bench in zip(names, merged.values(), strict=True)}


def latency_figure(result: Bench, own: Mapping[str, Look] | None = None) -> Figure | None:
    """TTFT and TPOT side by side, both axes logarithmic; None where nothing was measured.

    Points are medians over the repeats, bars reach from the fastest to the slowest. `own`: of models known elsewhere.
    """
    if not any(point["status"] == MEASURED for model in result["models"] for point in model["points"]):
        return None
    drawn = [_look(model["model"], number, own or {}) for number, model in enumerate(result["models"])]
    figure = Figure(figsize=(9.5, 4.0), layout="constrained")
    at_once = sorted({point["concurrency"] for model in result["models"] for point in model["points"]})
    for i, (key, title, unit, scale) in enumerate(PANELS):
        axes = figure.add_subplot(1, 2, i + 1)
        for look, model in zip(drawn, result["models"], strict=True):
            for concurrency in at_once:
                _curve(axes, model, look, concurrency, at_once, key, scale)
        log_axis(axes)
        low, high = axes.get_ylim()
        ended = [n for n, model in enumerate(result["models"]) if _ends(model)]
        axes.set_ylim(low, high * (high / low) ** (0.07 * len(ended)))  # room for the crosses
        for row, number in enumerate(ended):
            ends, colour = _ends(result["models"][number]), drawn[number].colour
            _crosses(axes, ends, colour, 0.97 - 0.06 * row, len(at_once) > 1)
        _length_axis(axes, result)
        axes.set_title(title)
        axes.set_ylabel(unit)
    if own:
        figure.suptitle(
            f"hylo bench {result['kind']}, {result['device']}", fontsize=9.5, x=0.01, ha="left", color=MUTED
        )
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), handlelength=2.6)
    return figure


def _look(name: str, number: int, own: Mapping[str, Look]) -> Look:
    if name in own:
        return own[name]
    taken = {look.colour for look in own.values()}
    free = [n for n, colour in enumerate(COLOURS) if colour not in taken] or list(range(len(COLOURS)))
    n = free[number % len(free)]
    return Look(name, COLOURS[n], MARKERS[n])


def _curve(axes: Axes, model: Bench, look: Look, concurrency: int, at_once: list[int], key: str, scale: int) -> None:
    points = [p for p in model["points"] if p["status"] == MEASURED and p["concurrency"] == concurrency]
    several = f", {concurrency} at once" if len(at_once) > 1 else ""
    lengths, values = [point["length"] for point in points], [scale * point[key] for point in points]
    repeats = [[scale * value for value in point.get(f"{key}_of_repeats", [point[key]])] for point in points]
    below = [value - min(all_) for value, all_ in zip(values, repeats, strict=True)]
    above = [max(all_) - value for value, all_ in zip(values, repeats, strict=True)]
    axes.errorbar(
        lengths,
        values,
        (below, above),
        label=f"{look.label}{several}",
        color=look.colour,
        marker=look.marker,
        linestyle=LINES[at_once.index(concurrency) % len(LINES)],
        linewidth=1.8,
        markersize=6,
        markeredgecolor=PAPER,
        markeredgewidth=0.6,
        elinewidth=1,
        capsize=2,
    )


def _ends(model: Bench) -> dict[int, int]:
    """The shortest context that ran out of memory, by concurrency."""
    ends: dict[int, int] = {}
    for point in model["points"]:
        if point["status"] == OUT_OF_MEMORY:
            ends.setdefault(point["concurrency"], point["length"])
    return ends


def _crosses(axes: Axes, ends: dict[int, int], colour: str, height: float, named: bool) -> None:
    """Above all curves, a row for each model; `named`: with the concurrencies that they are of."""
    for length in sorted(set(ends.values())):
        place: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
        axes.plot([length], [height], transform=place["xycoords"], marker="x", color=colour, label="_", markersize=7)
        if named:
            which = ", ".join(str(concurrency) for concurrency, at in sorted(ends.items()) if at == length)
            axes.annotate(which, (length, height), xytext=(7, 0), va="center", fontsize=8, **place)


def _length_axis(axes: Axes, result: Bench) -> None:
    lengths = sorted({point["length"] for model in result["models"] for point in model["points"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [short_length(length) for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
    crosses = any(point["status"] == OUT_OF_MEMORY for model in result["models"] for point in model["points"])
    axes.set_xlabel(f"context length (tokens){'; a cross: out of memory' if crosses else ''}")
