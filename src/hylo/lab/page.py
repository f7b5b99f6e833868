"""The laboratory's page, in one file: question, what the seeds show, tables, figures, failures, costs, command."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from hylo.files import write_bytes, write_json, write_text
from hylo.lab.compare import BETTER, SAME, WORSE, Comparison, SuiteView, compare
from hylo.lab.figure import draw_lab
from hylo.lab.table import (
    NOTHING,
    headed,
    how_many,
    interval,
    left_out,
    markdown,
    notes,
    probability,
    verdict,
    verdicts,
    with_error,
)  # fmt: skip
from hylo.report.drawing import FIGURE_CSS
from hylo.report.names import count
from hylo.report.style import STYLE
from hylo.report.tables import table, titled, together

CAPTIONS = {
    "arms": "Every arm's mean (large) over its seeds (small), with two standard errors; dashed: the baseline's mean. "
    "Colours are the verdicts, which are of the differences below: arms vary together from seed to seed.",
    "differences": "Difference from the baseline, seed by seed (small), its mean and two standard errors; dashed: no "
    "difference.",
    "lines": "Means over seeds (small) with two standard errors.",
}
KINDS = (BETTER, WORSE, SAME)
WRAPPED = """
td:first-child { white-space: normal; min-width: 9em; max-width: 22em; }
th.n { white-space: normal; }
td.n { white-space: nowrap; }
"""
ORDER = ("lines", "arms", "differences")


def write_lab(view: SuiteView, results: list[dict[str, Any]], out: Path, command: str) -> Comparison:
    """Writes lab.json, lab.md, lab.html, and figures/*.png and *.svg under `out`, each file whole or not at all.

    `results` are `compare`'s, `command` is what made them. Raises HyloError if a file cannot be written.
    """
    comparison = compare(view, results)
    figures = draw_lab(comparison)
    write_json(out / "lab.json", comparison.to_json() | {"command": command})
    write_text(out / "lab.md", _readme(comparison, list(figures), command))
    for name, figure in figures.items():
        write_bytes(out / "figures" / f"{name}.png", figure.png)
        write_text(out / "figures" / f"{name}.svg", figure.file)
    write_text(out / "lab.html", page(comparison, {name: figure.svg for name, figure in figures.items()}, command))
    return comparison


def page(comparison: Comparison, figures: Mapping[str, str], command: str) -> str:
    """`figures` are SVG elements by name."""
    view = comparison.view
    done, planned = sum(len(runs.done) for runs in comparison.runs.values()), len(view.arms) * len(view.seeds)
    badge = f'<span class="badge {"pass" if done == planned else "fail"}">{done} of {planned} runs done</span>'
    size = f"<span>{_some(len(view.arms), 'arm')}, {_some(len(view.seeds), 'seed')}</span>"
    sections = [
        f"<header><h1>{escape(view.title)}</h1><p>{size} {badge}</p></header>",
        _section("Question", f'<p class="lead">{escape(view.question)}</p>' if view.question else ""),
        _section("What the seeds show", _verdict(comparison)),
        _section("The arms side by side", _overview(comparison)),
        _section("Figures", "".join(_figure(figures, name) for name in ORDER)),
        _section("Differences from the baseline", _differences(comparison)),
        _section("The arms", _arms(comparison)),
        _section("Failed and missing", _listed(left_out(comparison))),
        _section("Costs", _costs(comparison)),
        _section("How it was made", f"<p><code>{escape(command)}</code></p>"),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(view.title)}</title>\n<style>{FIGURE_CSS}{STYLE}{WRAPPED}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _readme(comparison: Comparison, figures: list[str], command: str) -> str:
    view = comparison.view
    parts = [f"# {view.title}", view.question, markdown(comparison).rstrip()]
    parts += [f"![{name}](figures/{name}.png)" for name in ORDER if name in figures]
    return "\n\n".join(part for part in (*parts, f"    {command}") if part) + "\n"


def _verdict(comparison: Comparison) -> str:
    """By metric, which arms are better than the baseline, worse, and not told apart from it."""
    rows = [
        [escape(title), *("<br>".join(map(escape, by_kind.get(kind, [NOTHING]))) for kind in KINDS)]
        for title, by_kind in verdicts(comparison).items()
    ]
    if not rows:
        return "<p>Nothing yet: no arm has a seed in common with the baseline.</p>"
    against = f"<p>Against {escape(comparison.view.called(comparison.view.baseline))}, seed by seed:</p>"
    heads = ["", *(kind.capitalize() for kind in KINDS)]
    return against + table(heads, rows, text_columns=4) + _notes(comparison)


def _notes(comparison: Comparison) -> str:
    skipped = set(left_out(comparison))
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes(comparison) if note not in skipped)


def _overview(comparison: Comparison) -> str:
    """An arm a row, a metric a column."""
    view = comparison.view
    rows = []
    for name in view.arms:
        own = " <small>baseline</small>" if name == view.baseline else ""
        cells = [f"{escape(view.called(name))}{own}", how_many(comparison.runs[name])]
        for metric in view.metrics:
            text = with_error(comparison.summaries[name].get(metric.key), metric)
            if difference := comparison.differences.get(name, {}).get(metric.key):
                below = with_error(difference, metric)
                kind = {BETTER: ' class="pass"', WORSE: ' class="fail"'}.get(difference.verdict, "")
                text += f"<br><small><span{kind}>{below}</span></small>"
            cells.append(text)
        rows.append(cells)
    heads = ["Arm", "Seeds", *(escape(headed(metric)) for metric in view.metrics)]
    note = (
        '<p class="note">Mean ± one standard error over seeds; below it, the difference from the baseline ± its '
        "standard error, seed by seed. ↓ lower is better, ↑ higher.</p>"
    )
    return table(heads, rows) + note


def _differences(comparison: Comparison) -> str:
    """A table a metric: differences with intervals and p-values."""
    view = comparison.view
    tables = []
    for metric in view.metrics:
        rows = []
        for name, by_metric in comparison.differences.items():
            if difference := by_metric.get(metric.key):
                kind = {BETTER: ' class="pass"', WORSE: ' class="fail"'}.get(difference.verdict, "")
                rows.append(
                    [
                        escape(view.called(name)),
                        f"<span{kind}>{verdict(difference)}</span>",
                        f"{difference.n} of {len(view.seeds)}",
                        with_error(difference, metric),
                        interval(difference, metric) or NOTHING,
                        probability(difference.p),
                        probability(difference.holm),
                    ]
                )
        heads = ["Arm", "Verdict", "Seeds", "Difference", "95&nbsp;% interval", "p", "p, Holm"]
        tables.append(titled(escape(metric.title), table(heads, rows, text_columns=2)) if rows else "")
    note = (
        "<p class=\"note\">± is one standard error. Intervals and p are the paired t-test's (the sign test's where all "
        f"seeds differ alike); Holm's correction is for all {comparison.comparisons} comparisons of this page.</p>"
    )
    return together(*tables) + note if any(tables) else ""


def _arms(comparison: Comparison) -> str:
    view = comparison.view
    if not any(arm.note for arm in view.arms.values()):
        return ""
    return table(
        ["Arm", "What it is"],
        [[escape(view.called(name)), escape(arm.note)] for name, arm in view.arms.items() if arm.note],
        text_columns=2,
    )


def _costs(comparison: Comparison) -> str:
    """Of the runs that were finished."""
    view, runs = comparison.view, comparison.runs
    rows = [
        [escape(view.called(name)), f"{len(own.done)}", *_cost(own.tokens, own.seconds, len(own.done))]
        for name, own in runs.items()
    ]
    n, tokens = sum(len(own.done) for own in runs.values()), sum(own.tokens for own in runs.values())
    seconds = sum(own.seconds for own in runs.values())
    rows.append(["<b>All</b>", f"{n}", *_cost(tokens, seconds, n)])
    return table(["Arm", "Runs", "Tokens", "of one run", "Time", "of one run"], rows) if n else ""


def _some(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _cost(tokens: int, seconds: float, n: int) -> list[str]:
    return [count(tokens), count(tokens / n), duration(seconds), duration(seconds / n)] if n else [NOTHING] * 4


def duration(seconds: float) -> str:
    """`42 s`, `3.5 min` or `2.1 h`."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def _listed(lines: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _figure(figures: Mapping[str, str], name: str) -> str:
    if name not in figures:
        return ""
    legend = f'<figcaption id="caption-{name}">{CAPTIONS[name]}</figcaption>'
    return f'<figure><div class="scroll">{figures[name]}</div>{legend}</figure>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""
