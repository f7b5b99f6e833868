"""Latency by context length, drawn: a line for every model, a cross where memory ran out."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.table import Table

from hylo.files import write_bytes, write_json, write_text
from hylo.report.drawing import Drawing, drawn_as, log_axis
from hylo.report.names import short_length
from hylo.serve.latency import BEYOND, FAILED, LEFT_OUT, MEASURED, OUT_OF_MEMORY

COLOURS = ("#0072B2", "#1a1a1a", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")  # Okabe and Ito's
MARKERS = ("o", "s", "^", "D", "v", "P", "h")
LINES = ("-", "--", ":", "-.")  # by concurrency
SHORT = {OUT_OF_MEMORY: "no memory", BEYOND: "beyond", FAILED: "failed", LEFT_OUT: "-"}
PANELS = (("ttft", "Time to first token", "seconds", 1), ("tpot", "Time per output token", "milliseconds", 1000))


def write_latency(out: Path, result: dict[str, Any]) -> None:
    """latency.json, latency.png and latency.svg in the directory `out`."""
    write_json(out / "latency.json", result)
    if (drawing := draw_latency(result)) is not None:
        write_bytes(out / "latency.png", drawing.png)
        write_text(out / "latency.svg", drawing.svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def draw_latency(result: dict[str, Any]) -> Drawing | None:
    """TTFT and TPOT side by side, both axes logarithmic; None where nothing was measured."""
    return drawn_as("latency", lambda: _figure(result))


def _figure(result: dict[str, Any]) -> Figure | None:
    if not any(point["status"] == MEASURED for model in result["models"] for point in model["points"]):
        return None
    figure = Figure(figsize=(9.5, 4.0), layout="constrained")
    at_once = sorted({point["concurrency"] for model in result["models"] for point in model["points"]})
    for i, (key, title, unit, scale) in enumerate(PANELS):
        axes = figure.add_subplot(1, 2, i + 1)
        for number, model in enumerate(result["models"]):
            for concurrency in at_once:
                _curve(axes, model, number, concurrency, at_once, key, scale)
        log_axis(axes)
        low, high = axes.get_ylim()
        ended = [n for n, model in enumerate(result["models"]) if _ends(model)]
        axes.set_ylim(low, high * (high / low) ** (0.07 * len(ended)))  # room for the crosses
        for row, number in enumerate(ended):
            _crosses(axes, _ends(result["models"][number]), number, 0.97 - 0.06 * row, len(at_once) > 1)
        _length_axis(axes, result)
        axes.set_title(title)
        axes.set_ylabel(unit)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), handlelength=2.6)
    return figure


def _curve(
    axes: Axes, model: dict[str, Any], number: int, concurrency: int, at_once: list[int], key: str, scale: int
) -> None:
    points = [p for p in model["points"] if p["status"] == MEASURED and p["concurrency"] == concurrency]
    several = f", {concurrency} at once" if len(at_once) > 1 else ""
    axes.plot(
        [point["length"] for point in points],
        [scale * point[key] for point in points],
        label=f"{model['model']}{several}",
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        linestyle=LINES[at_once.index(concurrency) % len(LINES)],
        linewidth=1.8,
        markersize=6,
        markeredgecolor="white",
        markeredgewidth=0.6,
    )


def _ends(model: dict[str, Any]) -> dict[int, int]:
    """The shortest context that ran out of memory, by concurrency."""
    ends: dict[int, int] = {}
    for point in model["points"]:
        if point["status"] == OUT_OF_MEMORY:
            ends.setdefault(point["concurrency"], point["length"])
    return ends


def _crosses(axes: Axes, ends: dict[int, int], number: int, height: float, named: bool) -> None:
    """Above all curves, a row for each model; `named`: with the concurrencies that they are of."""
    colour = COLOURS[number % len(COLOURS)]
    for length in sorted(set(ends.values())):
        place: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
        axes.plot([length], [height], transform=place["xycoords"], marker="x", color=colour, label="_", markersize=7)
        if named:
            which = ", ".join(str(concurrency) for concurrency, at in sorted(ends.items()) if at == length)
            axes.annotate(which, (length, height), xytext=(7, 0), va="center", fontsize=8, color=colour, **place)


def _length_axis(axes: Axes, result: dict[str, Any]) -> None:
    lengths = sorted({point["length"] for model in result["models"] for point in model["points"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [short_length(length) for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
    crosses = any(point["status"] == OUT_OF_MEMORY for model in result["models"] for point in model["points"])
    axes.set_xlabel(f"context length (tokens){'; a cross: out of memory' if crosses else ''}")


def print_latency(result: dict[str, Any], console: Console) -> None:
    """A row for each model and concurrency, a column for each length: TTFT in s / TPOT in ms."""
    lengths = sorted({point["length"] for model in result["models"] for point in model["points"]})
    table = Table(title="TTFT in s / TPOT in ms", title_justify="left")
    table.add_column("model")
    table.add_column("at once", justify="right")
    for length in lengths:
        table.add_column(short_length(length), justify="right")
    for model in result["models"]:
        for concurrency in sorted({point["concurrency"] for point in model["points"]}):
            cells = {p["length"]: _cell(p) for p in model["points"] if p["concurrency"] == concurrency}
            table.add_row(model["model"], str(concurrency), *(cells.get(length, "-") for length in lengths))
    console.print(table)


def _cell(point: dict[str, Any]) -> str:
    if point["status"] != MEASURED:
        return SHORT[point["status"]]
    return f"{point['ttft']:.3g} / {1000 * point['tpot']:.3g}"
