"""Writes a report: the dictionary is kept as JSON, drawn as figures, and shown as a page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hylo.errors import HyloError
from hylo.files import write_bytes, write_json, write_text
from hylo.report.collect import collect
from hylo.report.figures import draw_figures
from hylo.report.page import page
from hylo.report.verdict import verdict

METRICS = ("step", "loss", "tokens", "learning_rate", "tokens_per_second", "seconds")


def report_of(paths: Sequence[Path], out: Path) -> dict[str, Any]:
    """Merges runs and results (hylo.report.collect), adds "verdict", and writes the report under `out`; returns it.

    Raises HyloError, before anything is written, for what is no result or does not fit together.
    """
    if clash := [path for path in paths if path.is_dir() and path.resolve() == out.resolve()]:
        raise HyloError(f"{clash[0]} has a report.json of its own, which this one would replace; choose another --out")
    report = collect(paths)
    report["verdict"] = verdict(report)
    write_report(out, report)
    return report


def write_report(out: Path, report: dict[str, Any]) -> None:
    """Writes report.json, report.html, and figures/*.png and *.svg under `out`; each file whole or not at all.

    Keys of a run's report: title, base, layout, plan (Plan.to_json), kv_percent_of_base, lengths, l_short, l_long,
    stages: [{name, metrics: {needle, needle_se, needle_depth, kl, perplexity}, seconds, tokens}], metrics by length;
    training: {stage: [{step, loss, tokens, ...}]}; losses: {stage: what its loss is, if neither a distance nor a KL};
    checks: [{name, value, threshold, passed}]; meta. More are hylo.report.collect's.
    Whatever is missing is left out of the page. Raises HyloError if a file cannot be written.
    """
    figures = draw_figures(report)
    shown = page(report, {name: figure.svg for name, figure in figures.items()})
    write_json(out / "report.json", report)
    for name, figure in figures.items():
        write_bytes(out / "figures" / f"{name}.png", figure.png)
        write_text(out / "figures" / f"{name}.svg", figure.file)
    write_text(out / "report.html", shown)


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
