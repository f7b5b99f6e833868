"""Which scores the figures draw, and what their axes say of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from hylo.report.measures import ALL, Estimate, Measure, measures

RULER_TASKS = 13
SHORT = {"gsm8k": "GSM8K", "commonsense": "commonsense, mean of tasks"}  # figure 1 has the first that there is
Report = Mapping[str, Any]
Cells = dict[str, dict[str, Estimate]]  # by model, then by length, or ALL


def cells_of(report: Report, suite: str, title: str = "") -> Cells:
    """The scores that stand for a suite; `title` picks one where it has several."""
    return next((m.cells for m in measures(report) if m.suite == suite and title in m.title), {})


def chosen_short(report: Report) -> str | None:
    """The suite whose score figure 1 sets against RULER: GSM8K if a model has both, else commonsense."""
    ruler = cells_of(report, "ruler")
    return next((suite for suite in SHORT if any(name in ruler for name in cells_of(report, suite))), None)


def short_scores(report: Report, suite: str) -> dict[str, Estimate]:
    return {name: cells[ALL] for name, cells in cells_of(report, suite).items() if ALL in cells}


def long_measure(report: Report, names: Sequence[str]) -> Measure | None:
    """What stands for long contexts among these models: mean RULER where two have it, else needle accuracy."""
    for measure in measures(report):
        if measure.suite in ("ruler", "needle") and sum(name in measure.cells for name in names) > 1:
            return measure
    return None


def long_label(report: Report, measure: Measure) -> str:
    return ruler_label(report) if measure.suite == "ruler" else f"{measure.title} ({measure.unit})"


def ruler_label(report: Report) -> str:
    """`mean RULER`, with the number of tasks where it is not all, and the haystack where it is a stand-in."""
    part = report["suites"]["ruler"]
    counts = sorted({cell["tasks"] for result in part["results"].values() for cell in result["mean"].values()})
    notes = [] if counts == [RULER_TASKS] else [f"{' or '.join(map(str, counts))} of {RULER_TASKS} tasks"]
    haystack = str((part.get("settings") or {}).get("haystack", ""))
    notes += ["stand-in haystack"] if haystack.startswith("stand-in") else []
    return f"mean RULER ({', '.join(notes)})" if notes else "mean RULER"
