"""Perplexity and divergence from the teacher by position in the context: what a longer context is worth to a model."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hylo.report.drawing import log_axis
from hylo.report.names import Look, looks, short_length
from hylo.report.readings import Report
from hylo.report.scores import BARS

PANELS = (
    ("perplexity", "Perplexity by position", "perplexity"),
    ("kl", "Divergence by position", "KL to the teacher (nats per token)"),
)


def positions_figure(report: Report) -> Figure | None:
    """At the longest length that every model was measured at; a step for each bucket of positions."""
    results = report["suites"].get("intrinsic", {}).get("results", {})
    by_name = {name: result["by_position"] for name, result in results.items() if result.get("by_position")}
    common = set.intersection(*({int(n) for n in found} for found in by_name.values())) if by_name else set()
    if not common:
        return None
    length = max(common)
    buckets = {name: by_name[name][str(length)] for name in report["models"] if name in by_name}
    panels = [
        panel for panel in PANELS if any(b.get(panel[0]) is not None for found in buckets.values() for b in found)
    ]
    if not panels:
        return None
    own = looks(report)
    figure = Figure(figsize=(0.6 + 4.6 * len(panels), 3.8), layout="constrained")
    for i, (key, title, unit) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        axes.set_title(f"{title}, {length:,} tokens")
        axes.set_ylabel(unit)
        for name, found in buckets.items():
            _line(axes, found, key, own[name])
        edges = max(buckets.values(), key=len)
        axes.set_xticks(range(len(edges)), [f"{b['from']}–\n{short_length(b['to'])}" for b in edges], fontsize=8)
        axes.set_xlabel("position in the context (tokens)")
        axes.grid(axis="x", visible=False)
        log_axis(axes)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)), handlelength=2.6)
    return figure


def _line(axes: Axes, buckets: list[dict[str, Any]], key: str, look: Look) -> None:
    points = [(x, b[key], b.get(f"{key}_se") or 0.0) for x, b in enumerate(buckets) if b.get(key)]
    if not points:
        return
    at, heights, errors = zip(*points, strict=True)
    axes.errorbar(at, heights, errors, ecolor=look.colour, **BARS)
    style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "linestyle": look.line}
    axes.plot(at, heights, label=look.label, linewidth=1.8, markersize=5, **style)
