"""Every score of a report with its standard error, whatever suite it is of: what figures, tables and verdict read."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ALL = ""  # the key of a score that has no length


@dataclass(frozen=True)
class Estimate:
    """`error` is one standard error; `samples` are independent ones, `tasks` those that a mean is over, if known."""

    value: float
    error: float | None = None
    samples: int | None = None
    tasks: int | None = None
    failed: int = 0

    @property
    def interval(self) -> float | None:
        """Half of the 95 % confidence interval."""
        return None if self.error is None else 1.96 * self.error


@dataclass(frozen=True)
class Measure:
    """`cells`: by model, then by length (a string, as in JSON) or ALL. `task` is empty for a suite's own score."""

    suite: str
    title: str
    unit: str = "%"
    higher_is_better: bool = True
    task: str = ""
    cells: dict[str, dict[str, Estimate]] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """Lengths that any model has, shortest first."""
        return sorted({key for cells in self.cells.values() for key in cells}, key=lambda key: int(key or 0))


def measures(report: Mapping[str, Any]) -> list[Measure]:
    """The scores that stand for a suite, in the order of a report; those without a value are left out."""
    found = [*_means(report), *_by_length(report)]
    return [measure for measure in found if measure.cells]


def task_measures(report: Mapping[str, Any], suite: str) -> list[Measure]:
    """Each task of ruler, commonsense or gsm8k."""
    results = report["suites"].get(suite, {}).get("results", {})
    tasks = list(dict.fromkeys(task for result in results.values() for task in result.get("scores", {})))
    found = []
    for task in tasks:
        cells = {name: _cells(result["scores"].get(task)) for name, result in results.items() if "scores" in result}
        found.append(Measure(suite, task, task=task, cells={name: by for name, by in cells.items() if by}))
    return [measure for measure in found if measure.cells]


def _means(report: Mapping[str, Any]) -> Iterator[Measure]:
    titles = {"ruler": "mean RULER", "commonsense": "mean commonsense", "gsm8k": "GSM8K"}
    for suite, title in titles.items():
        results = report["suites"].get(suite, {}).get("results", {})
        cells = {name: _cells(result.get("mean")) for name, result in results.items()}
        yield Measure(suite, title, cells={name: by for name, by in cells.items() if by})


def _cells(found: Any) -> dict[str, Estimate]:
    """From {"score", "se", ...} or {length: {"score", "se", ...}}."""
    if not found:
        return {}
    cells = {ALL: found} if "score" in found else found
    return {
        key: Estimate(cell["score"], cell.get("se"), cell.get("samples"), cell.get("tasks"), cell.get("failed") or 0)
        for key, cell in cells.items()
        if cell.get("score") is not None
    }


def _by_length(report: Mapping[str, Any]) -> Iterator[Measure]:
    for suite, key, title, unit, higher in (
        ("needle", "needle", "needle accuracy", "%", True),
        ("intrinsic", "perplexity", "perplexity", "", False),
        ("intrinsic", "kl", "KL to the teacher", "nats/token", False),
    ):
        scale, cells = 100 if unit == "%" else 1, {}
        for name, result in report["suites"].get(suite, {}).get("results", {}).items():
            errors, samples = result.get(f"{key}_se") or {}, result.get(f"{key}_answers") or {}
            cells[name] = {
                length: Estimate(scale * value, _scaled(errors.get(length), scale), samples.get(length))
                for length, value in (result.get(key) or {}).items()
                if value is not None
            }
        yield Measure(suite, title, unit, higher, cells={name: by for name, by in cells.items() if by})


def _scaled(error: float | None, scale: float) -> float | None:
    return None if error is None else scale * error


def mean_over_tasks(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"score", "se", "tasks"} over the tasks that have a score; se = sqrt(sum of se^2) / tasks."""
    scored = [cell for cell in cells if cell["score"] is not None]
    errors = [cell.get("se") for cell in scored]
    known = [error for error in errors if error is not None]
    return {
        "score": sum(cell["score"] for cell in scored) / len(scored) if scored else None,
        "se": math.sqrt(sum(error**2 for error in known)) / len(scored)
        if scored and len(known) == len(scored)
        else None,
        "tasks": len(scored),
    }
