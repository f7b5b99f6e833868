"""The figures of a report by name, each drawn from the report's dictionary alone; one without data is left out."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from hylo.report.collect import completed
from hylo.report.curves import lengths_figure, result_figure, training_figure
from hylo.report.drawing import Drawing, drawn_as
from hylo.report.latency import latency_figures
from hylo.report.mla_drawing import initialisation_figure
from hylo.report.needle_map import needle_figure
from hylo.report.plan_drawing import plan_figure
from hylo.report.positions import positions_figure
from hylo.report.scores import short_long_figure
from hylo.report.trained import teacher_size_figure, training_length_figure

FIGURES: dict[str, Callable[[dict[str, Any]], Figure | None]] = {
    "result": result_figure,  # for a README
    "short_long": short_long_figure,  # the paper's figure 1
    "lengths": lengths_figure,
    "depth": needle_figure,  # 2
    "positions": positions_figure,
    "training_length": training_length_figure,  # 3
    "teacher_size": teacher_size_figure,  # 4
    "plan": plan_figure,  # 6, and
    "initialisation": initialisation_figure,
    "training": training_figure,
}


def draw_figures(report: Mapping[str, Any]) -> dict[str, Drawing]:
    """All figures that there is data for; figure 5 as latency_serve or latency_generate, by what measured it."""
    full = completed(dict(report))
    makers = {name: partial(draw, full) for name, draw in FIGURES.items()} | latency_figures(full)
    return {name: drawing for name, make in makers.items() if (drawing := drawn_as(name, make)) is not None}
