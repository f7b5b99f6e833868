"""A comparison as a table: for the terminal a section a metric, for a README a column a metric."""

import html
import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from hylo.lab.compare import BETTER, LEVEL, SAME, WORSE, Comparison, Difference, Metric, Runs, Summary
from hylo.report.names import amount

NOTHING = "–"
MARK = "†"  # of a difference that stands after Holm's correction


def table(comparison: Comparison) -> Table:
    """A section a metric: every arm's mean and its difference from the baseline, each with its standard error."""
    view = comparison.view
    title = (
        f"{view.title}: mean and difference from {view.called(view.baseline)}, ± one standard error; ↓ lower is better"
    )
    shown = Table("", "seeds", "mean", "difference", "", box=SIMPLE_HEAD, pad_edge=False)
    shown.title, shown.title_justify, shown.caption_justify = escape(title), "left", "left"
    shown.caption = escape("\n".join(notes(comparison)))
    for column in shown.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for metric in view.metrics:
        shown.add_row(f"[bold]{escape(headed(metric))}[/]")
        for name in view.arms:
            summary = comparison.summaries[name].get(metric.key)
            difference = comparison.differences.get(name, {}).get(metric.key)
            shown.add_row(
                escape(view.called(name)),
                seeds(comparison, name, metric),
                with_error(summary, metric),
                "baseline" if name == view.baseline else with_error(difference, metric),
                verdict(difference).replace(SAME, "neither") if name != view.baseline else "",
                style={BETTER: "green", WORSE: "red"}.get(difference.verdict) if difference else None,
            )
        shown.add_section()
    return shown


def markdown(comparison: Comparison) -> str:
    """A GitHub table: an arm a row; in each metric's cell mean ± standard error and, below it, the difference from the
    baseline ± its error, bold where better by more than two errors."""
    view = comparison.view
    heads = ["", "seeds", *(headed(metric) for metric in view.metrics)]
    lines = [_row(heads), _row(["---", *["---:"] * (len(heads) - 1)])]
    for name in view.arms:
        cells = []
        for metric in view.metrics:
            text = with_error(comparison.summaries[name].get(metric.key), metric)
            if difference := comparison.differences.get(name, {}).get(metric.key):
                below = with_error(difference, metric)
                text += f"<br>**{below}**" if difference.verdict == BETTER else f"<br>{below}"
                text += MARK if difference.stands else ""
            cells.append(text)
        title = html.escape(view.called(name), quote=False) + (" (baseline)" if name == view.baseline else "")
        lines.append(_row([title, how_many(comparison.runs[name]), *cells]))
    legend = (
        f"Mean ± standard error; below it the difference from {view.called(view.baseline)} ± its error, seed by seed, "
        "bold where better by more than two of them."
    )
    return "\n".join([*lines, "", "\n\n".join([legend, *notes(comparison)])]) + "\n"


def notes(comparison: Comparison) -> list[str]:
    """What a reader must know of the table: how strong its verdicts are, and what is not in it."""
    found = []
    if comparison.chance is not None:
        found.append(
            f"Better and worse: a difference of more than two standard errors, which {comparison.pairs} seeds exceed "
            f"in {100 * comparison.chance:.0f} % of comparisons where there is none."
        )
        stand = sum(each.stands for by in comparison.differences.values() for each in by.values())
        many = comparison.comparisons
        found.append(
            f"{MARK} {stand} of {many} comparison{'s' * (many > 1)} stand{'s' * (stand == 1)} at "
            f"{100 * LEVEL:.0f} % by the paired t-test with Holm's correction for making {many}."
        )
    elif comparison.pairs:
        found.append("One seed has no error: differences are shown, and none is judged.")
    return found + left_out(comparison)


def left_out(comparison: Comparison) -> list[str]:
    """Failed, missing and unmeasured runs: how many, and which."""
    runs = comparison.runs.items()
    parts = (
        ("failed", [f"{comparison.view.called(arm)} seed {seed}: {why or 'no reason given'}"
                    for arm, each in runs for seed, why in each.failed.items()]),
        ("not run", [f"{comparison.view.called(arm)} seed{'s' * (len(each.missing) > 1)} {_listed(each.missing)}"
                     for arm, each in runs if each.missing]),
        ("without a finite value", [f"{comparison.view.called(arm)} seed {seed}, {key}"
                                    for arm, each in runs for seed, key in each.unmeasured]),
    )  # fmt: skip
    counts = (
        sum(len(each.failed) for _, each in runs),
        sum(len(each.missing) for _, each in runs),
        sum(len(each.unmeasured) for _, each in runs),
    )
    return [f"{n} {what}: {'; '.join(named)}." for n, (what, named) in zip(counts, parts, strict=True) if n]


def verdict(difference: Difference | None) -> str:
    if difference is None:
        return ""
    if difference.n < 2:
        return "one seed"
    return difference.verdict + (f" {MARK}" if difference.stands else "")


def with_error(summary: Summary | None, metric: Metric) -> str:
    """`0.0432 ± 0.0011`; a difference has its sign, and both as many decimals as the error has two figures for."""
    if summary is None:
        return NOTHING
    sign = "+" if isinstance(summary, Difference) else ""
    mean, error = metric.scale * summary.mean, summary.error
    if error is None or metric.scale * error < 1e-6:
        text = amount(mean)
        text = sign + text if mean > 0 else text
        return minus(text) + ("" if error is None else " ± 0")
    error *= metric.scale
    return minus(f"{mean:{sign},.{decimals(error)}f} ± {error:,.{decimals(error)}f}")


def interval(difference: Difference | None, metric: Metric) -> str:
    """`−0.0140 to +0.0020`."""
    if difference is None or difference.interval is None or not difference.error:
        return ""
    low, high = (metric.scale * bound for bound in difference.interval)
    places = decimals(metric.scale * difference.error)
    return minus(f"{low:+,.{places}f} to {high:+,.{places}f}")


def headed(metric: Metric) -> str:
    """`KL at 2K ↓`: with which way is better."""
    return f"{metric.title} {'↓' if metric.lower_is_better else '↑'}"


def probability(p: float | None) -> str:
    """`0.04`, `< 0.001`."""
    if p is None:
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def decimals(error: float) -> int:
    """That show two figures of an error; six at most."""
    return min(6, max(0, 1 - math.floor(math.log10(error)))) if error > 0 else 0


def minus(text: str) -> str:
    """With the sign that is as wide as a plus."""
    return text.replace("-", "−")


def how_many(runs: Runs) -> str:
    """`3`, or `2 of 3` where some did not finish."""
    planned = len(runs.done) + len(runs.failed) + len(runs.missing)
    return f"{len(runs.done)}" if len(runs.done) == planned else f"{len(runs.done)} of {planned}"


def seeds(comparison: Comparison, name: str, metric: Metric) -> str:
    """As `how_many`, of those with a value of this metric."""
    planned = len(comparison.view.seeds)
    summary = comparison.summaries[name].get(metric.key)
    n = summary.n if summary else 0
    return f"{n}" if n == planned else f"{n} of {planned}"


def verdicts(comparison: Comparison) -> dict[str, dict[str, list[str]]]:
    """By the metric's title and verdict: the arms that it is of."""
    found: dict[str, dict[str, list[str]]] = {}
    for metric in comparison.view.metrics:
        for arm, by_metric in comparison.differences.items():
            if difference := by_metric.get(metric.key):
                named = comparison.view.called(arm) + (f" {MARK}" if difference.stands else "")
                found.setdefault(metric.title, {}).setdefault(difference.verdict, []).append(named)
    return found


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
