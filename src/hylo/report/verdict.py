"""What got better and what got worse: the hybrid beside its teacher, its base and the baselines, in plain sentences.

`better` and `worse` need more than two standard errors of the difference, sqrt(se_a^2 + se_b^2), as if the two models
had been asked different questions. They were asked the same ones, so that the true error is mostly smaller.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hylo.report.measures import ALL, Estimate, Measure, measures, task_measures
from hylo.report.names import STAGES, amount, in_bytes, looks, short_length
from hylo.report.tables import decimal, with_interval

BETTER, WORSE, SAME = "better", "worse", "no difference that the samples can show"
ERRORS = 2.0  # standard errors of a difference, beyond which it is called one
Report = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """`length` is a string of tokens, or empty; values in the measure's unit, errors one standard error."""

    suite: str
    measure: str
    task: str
    length: str
    unit: str
    model: str
    against: str
    value: float
    error: float
    other_value: float
    other_error: float
    verdict: str


def verdict(report: Report) -> dict[str, Any]:
    """The hybrid against each other finished model: {"paragraph": plain text, without figures, "details": [{"against",
    "lines": [{"verdict", "text"}]}], with figures and task by task, "comparisons": [Comparison as JSON]}."""
    found = compare(report, measures(report))
    tasks = compare(report, task_measures(report, "ruler")) + compare(report, task_measures(report, "commonsense"))
    sentences: list[str] = []
    details: list[dict[str, Any]] = []
    for other in opponents(report):
        own = [comparison for comparison in found if comparison.against == other]
        if own:
            sentences.append(_sentence(report, other, own, first=not sentences))
            lines = _lines(own) + _by_task([comparison for comparison in tasks if comparison.against == other])
            details.append({"against": called(report, other), "lines": lines})
    paragraph = " ".join(filter(None, (*sentences, _memory(report))))
    return {"paragraph": paragraph, "details": details, "comparisons": [asdict(c) for c in found + tasks]}


def opponents(report: Report) -> list[str]:
    """Whom the hybrid is held against: not the stages on the way to it."""
    return [name for name, about in report["models"].items() if about["role"] not in ("hybrid", "stage")]


def compare(report: Report, of: Sequence[Measure]) -> list[Comparison]:
    """The hybrid against each opponent, wherever both have a value and a standard error, of as many tasks."""
    found = []
    for measure in of:
        own = measure.cells.get(report["hybrid"], {})
        for other in opponents(report):
            theirs = measure.cells.get(other, {})
            for length in measure.keys:
                if length not in own or length not in theirs:
                    continue
                a, b = own[length], theirs[length]
                if a.error is None or b.error is None or a.tasks != b.tasks:
                    continue
                found.append(
                    Comparison(
                        measure.suite, measure.title, measure.task, length, measure.unit, report["hybrid"], other,
                        a.value, a.error, b.value, b.error, judge(a, b, measure.higher_is_better, measure.unit == "%"),
                    )
                )  # fmt: skip
    return found


def judge(own: Estimate, other: Estimate, higher_is_better: bool = True, percent: bool = True) -> str:
    """BETTER, WORSE or SAME, for values with standard errors."""
    error = math.hypot(_error(own, percent), _error(other, percent))
    difference = own.value - other.value
    if not math.isfinite(difference) or abs(difference) <= ERRORS * error:
        return SAME
    return BETTER if (difference > 0) == higher_is_better else WORSE


def _error(estimate: Estimate, percent: bool) -> float:
    """The standard error; where all of a few samples agree, it says 0: then that of one among n + 2 that does not."""
    assert estimate.error is not None
    if estimate.error > 0 or not percent or not estimate.samples:
        return estimate.error
    n, p = estimate.samples, 1 / (estimate.samples + 2)
    return 100 * math.sqrt(p * (1 - p) / n)


def _sentence(report: Report, other: str, found: Sequence[Comparison], first: bool) -> str:
    """Which scores are better, which worse, and which the samples cannot tell apart."""
    hybrid = called(report, report["hybrid"]) if first else "it"
    parts = {kind: _places([c for c in found if c.verdict == kind], found) for kind in (BETTER, WORSE, SAME)}
    clauses = [f"{kind} in {parts[kind]}" for kind in (BETTER, WORSE) if parts[kind]]
    text = f"Against {called(report, other)}, "
    if clauses:
        text += f"{hybrid} is {' and '.join(clauses)}"
        return text + (f"; there is {SAME} in {parts[SAME]}." if parts[SAME] else ".")
    return text + f"{hybrid} is neither better nor worse: there is {SAME} in {parts[SAME]}."


def _places(found: Sequence[Comparison], of: Sequence[Comparison]) -> str:
    """`mean RULER and GSM8K`, with the lengths where it is not all of them that were compared."""
    parts = []
    for title, own in _by_measure(found).items():
        some = len(own) < sum(comparison.measure == title for comparison in of)
        parts.append(title + (f" at {listed([short_length(int(c.length)) for c in own])}" if some else ""))
    return listed(parts)


def _lines(found: Sequence[Comparison]) -> list[dict[str, str]]:
    """A line a verdict: `mean RULER at 8K (61 ± 2 against 55 ± 2) and 16K (...); GSM8K (...)`."""
    lines = []
    for kind in (BETTER, WORSE, SAME):
        parts = []
        for title, own in _by_measure([comparison for comparison in found if comparison.verdict == kind]).items():
            cells = [(f"{short_length(int(c.length))} " if c.length != ALL else "") + f"({_pair(c)})" for c in own]
            parts.append(f"{title} {'at ' if own[0].length != ALL else ''}{listed(cells)}")
        if parts:
            lines.append({"verdict": kind, "text": "; ".join(parts)})
    return lines


def _by_measure(found: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    by_measure: dict[str, list[Comparison]] = {}
    for comparison in found:
        by_measure.setdefault(comparison.measure, []).append(comparison)
    return by_measure


def _pair(c: Comparison) -> str:
    show = decimal if c.unit == "%" else amount
    own, other = Estimate(c.value, c.error), Estimate(c.other_value, c.other_error)
    return f"{with_interval(own, show)} against {with_interval(other, show)}"


def _by_task(found: Sequence[Comparison]) -> list[dict[str, str]]:
    """RULER's and commonsense tasks at each length, by name where they differ."""
    lines = []
    for suite, length in dict.fromkeys((comparison.suite, comparison.length) for comparison in found):
        here = [c for c in found if (c.suite, c.length) == (suite, length)]
        kinds = [(kind, [c.task for c in here if c.verdict == kind]) for kind in (BETTER, WORSE)]
        parts = [f"{len(tasks)} {kind} ({', '.join(tasks)})" for kind, tasks in kinds if tasks]
        if len(here) < 2 or not parts:
            continue
        rest = sum(c.verdict == SAME for c in here)
        parts += [f"{rest} without such a difference"] if rest else []
        title = {"ruler": "RULER", "commonsense": "commonsense"}[suite]
        where = f" at {short_length(int(length))}" if length else ""
        lines.append({"verdict": f"{title} task by task{where}", "text": f"of {len(here)}, {listed(parts)}"})
    return lines


def _memory(report: Report) -> str:
    """Bytes of one sequence as they were counted, at the longest length that both have."""
    results = report["suites"].get("intrinsic", {}).get("results", {})
    own = results.get(report["hybrid"], {}).get("memory") or {}
    for other in opponents(report):
        theirs = results.get(other, {}).get("memory") or {}
        if (both := set(own) & set(theirs)) and report["models"][other]["role"] in ("teacher", "base"):
            length = max(both, key=int)
            a, b = own[length]["total_bytes"], theirs[length]["total_bytes"]
            return (
                f"One sequence of {int(length):,} tokens takes {in_bytes(a)} of cache and state in "
                f"{called(report, report['hybrid'])} and {in_bytes(b)} in {called(report, other)}: {100 * a / b:.3g} %."
            )
    return ""


def called(report: Report, name: str) -> str:
    """`the teacher`, or `the teacher Llama-8B` where it has a name of its own."""
    role, label = report["models"][name]["role"], looks(report)[name].label
    if name in STAGES:
        usual = {"extended": "the hybrid", "no_alignment": "the model without alignment"}
        return usual.get(name, f"the {label.lower()}")
    if role in ("teacher", "base", "hybrid"):
        return f"the {role}" if role == name else f"the {role} {label}"
    return label


def listed(items: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
