"""Writes a run's report. The dictionary it takes is the report: it is kept as JSON and drawn as a page."""

import json
from pathlib import Path
from typing import Any

from hylo.files import write_bytes, write_json, write_text
from hylo.report.figures import draw_figures
from hylo.report.page import page

METRICS = ("step", "loss", "tokens", "learning_rate", "tokens_per_second", "seconds")


def write_report(run: Path, report: dict[str, Any]) -> None:
    """Writes report.json, report.html and figures/*.png under `run`.

    Keys of the report: title, base, layout, plan (Plan.to_json), kv_percent_of_base, lengths, l_short, l_long,
    stages: [{name, metrics: {needle, needle_se, needle_depth, kl, perplexity}, seconds, tokens}], metrics by length;
    training: {stage: [{step, loss, tokens, ...}]}; losses: {stage: what its loss is, if neither a distance nor a KL};
    checks: [{name, value, threshold, passed}]; meta.
    Whatever is missing is left out of the page. Raises HyloError if a file cannot be written.
    """
    figures = draw_figures(report)
    write_json(run / "report.json", report)
    for name, figure in figures.items():
        write_bytes(run / "figures" / f"{name}.png", figure.png)
    write_text(run / "report.html", page(report, {name: figure.svg for name, figure in figures.items()}))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The figures of every finished step from a stage's metrics.jsonl; none if there is no such file."""
    if not path.exists():
        return []
    steps = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the line that was being written when a run was stopped
            continue
        steps.append({key: record[key] for key in METRICS if key in record})
    return steps
