"""What a suite's runs show: every arm's mean over seeds, and its difference from the baseline seed by seed.

Two arms of one seed share what the seed decides, so that their difference varies less than either of them does: the
difference of pairs is what is judged. `better` and `worse` need more than two standard errors of it. That is a low bar
for few seeds (`Comparison.chance`), so that the 95 % interval by Student's t stands beside it, and what is left after
Holm's correction for having made all of the comparisons.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hylo.lab.student import critical, holm, two_sided

BETTER, WORSE, SAME = "better", "worse", "no difference shown"
ERRORS = 2.0  # standard errors of a paired difference, beyond which it is called one
ROUNDING = 1e-12  # of a mean: a spread that is no more is that of floats
LEVEL = 0.05  # of intervals, and of what Holm's correction leaves


@dataclass(frozen=True)
class Metric:
    """`key` is a measure and its length, as results have it: kl@2048 or, of a stage, converted:kl@2048.
    Needle accuracy is a share, shown in per cent."""

    key: str
    label: str
    lower_is_better: bool

    @property
    def scale(self) -> float:
        return 100.0 if self.key.rpartition(":")[2].startswith("needle@") else 1.0

    @property
    def title(self) -> str:
        return f"{self.label} (%)" if self.scale == 100 and "%" not in self.label else self.label


@dataclass(frozen=True)
class Arm:
    """`note` says what is different about it. Arms of a suite that lie on an axis have their place `x` on a `line`."""

    label: str
    note: str = ""
    x: float | None = None
    line: str = ""


@dataclass(frozen=True)
class SuiteView:
    """What of a suite its comparison needs; `axis` says what the arms' x is."""

    title: str
    question: str
    baseline: str
    arms: dict[str, Arm]
    seeds: list[int]
    metrics: list[Metric]
    axis: str = ""

    def called(self, name: str) -> str:
        return self.arms[name].label or name


@dataclass(frozen=True)
class Summary:
    """One arm's values of one metric. `error` is the standard error of the mean, None of fewer than two seeds."""

    values: dict[int, float]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return statistics.mean(self.values.values())

    @property
    def error(self) -> float | None:
        if self.n < 2:
            return None
        error = statistics.stdev(self.values.values()) / math.sqrt(self.n)
        return error if error > ROUNDING * abs(self.mean) else 0.0


@dataclass(frozen=True)
class Difference(Summary):
    """An arm less the baseline, over the seeds that both have; `holm` is the p-value after Holm's correction."""

    lower_is_better: bool = True
    holm: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %, by Student's t."""
        if self.error is None:
            return None
        half = critical(self.n - 1, LEVEL) * self.error
        return self.mean - half, self.mean + half

    @property
    def p(self) -> float | None:
        """Of the paired t-test, two-sided, of this comparison alone; of the sign test where all pairs differ alike, as
        shares of few answers may: they leave the t-test no spread to go by."""
        if self.error is None:
            return None
        if self.error == 0:
            return 0.5 ** (self.n - 1) if self.mean else 1.0
        return two_sided(self.mean / self.error, self.n - 1)

    @property
    def verdict(self) -> str:
        if self.error is None or abs(self.mean) <= ERRORS * self.error:
            return SAME
        return BETTER if (self.mean < 0) == self.lower_is_better else WORSE

    @property
    def stands(self) -> bool:
        """Whether it is a difference even after Holm's correction."""
        return self.holm is not None and self.holm <= LEVEL


@dataclass(frozen=True)
class Runs:
    """How an arm's seeds ended, and what the finished ones cost together; `failed` has each one's reason."""

    done: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    unmeasured: list[tuple[int, str]] = field(default_factory=list)  # seed and metric: not there, or not finite
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """`summaries` and `differences`: by arm, then by the metric's key; what has no value is left out."""

    view: SuiteView
    runs: dict[str, Runs]
    summaries: dict[str, dict[str, Summary]]
    differences: dict[str, dict[str, Difference]]

    @property
    def comparisons(self) -> int:
        """How many differences were tested, which Holm's correction is for."""
        return sum(each.p is not None for by_metric in self.differences.values() for each in by_metric.values())

    @property
    def pairs(self) -> int:
        """The most seeds that a difference is over."""
        return max((each.n for by_metric in self.differences.values() for each in by_metric.values()), default=0)

    @property
    def chance(self) -> float | None:
        """How often two standard errors of so many seeds are exceeded where there is no difference at all."""
        return two_sided(ERRORS, self.pairs - 1) if self.pairs > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Everything, by arm; values by seed (a string, as JSON has it)."""
        view = self.view
        return {
            "title": view.title,
            "question": view.question,
            "baseline": view.baseline,
            "seeds": view.seeds,
            "metrics": [
                {"key": metric.key, "label": metric.label, "lower_is_better": metric.lower_is_better}
                for metric in view.metrics
            ],
            "comparisons": self.comparisons,
            "arms": {name: self._arm_json(name) for name in view.arms},
        }

    def _arm_json(self, name: str) -> dict[str, Any]:
        arm, runs = self.view.arms[name], self.runs[name]
        metrics: dict[str, Any] = {}
        for key, summary in self.summaries[name].items():
            metrics[key] = {"n": summary.n, "mean": summary.mean, "error": summary.error}
            metrics[key]["values"] = {str(seed): value for seed, value in summary.values.items()}
            if key in self.differences.get(name, {}):
                metrics[key]["difference"] = _difference_json(self.differences[name][key])
        return {
            "label": arm.label,
            "note": arm.note,
            "x": arm.x,
            "line": arm.line,
            "done": runs.done,
            "failed": {str(seed): reason for seed, reason in runs.failed.items()},
            "missing": runs.missing,
            "unmeasured": [{"seed": seed, "metric": key} for seed, key in runs.unmeasured],
            "tokens": runs.tokens,
            "seconds": runs.seconds,
            "metrics": metrics,
        }


def compare(view: SuiteView, results: Sequence[Mapping[str, Any]]) -> Comparison:
    """`results`: of each arm and seed at most one {"arm", "seed", "status": "done" or "failed", "reason", "metrics":
    {"kl@256": 0.04, ...}, "tokens", "seconds"}. An arm and seed of the suite without a result is missing."""
    found = {(result["arm"], result["seed"]): result for result in results}
    runs, summaries = {}, {}
    for name in view.arms:
        own = {seed: found[name, seed] for seed in view.seeds if (name, seed) in found}
        done = {seed: result for seed, result in own.items() if result["status"] == "done"}
        measured = {metric.key: Summary(_values(done, metric.key)) for metric in view.metrics}
        summaries[name] = {key: summary for key, summary in measured.items() if summary.n}
        runs[name] = Runs(
            done=list(done),
            failed={seed: result.get("reason") or "" for seed, result in own.items() if seed not in done},
            missing=[seed for seed in view.seeds if seed not in own],
            unmeasured=[(seed, key) for key, each in measured.items() for seed in done if seed not in each.values],
            tokens=sum(result.get("tokens") or 0 for result in done.values()),
            seconds=math.fsum(result.get("seconds") or 0.0 for result in done.values()),
        )
    return Comparison(view, runs, summaries, _differences(view, summaries))


def _values(done: Mapping[int, Mapping[str, Any]], key: str) -> dict[int, float]:
    measured = {seed: result["metrics"].get(key) for seed, result in done.items()}
    return {seed: float(value) for seed, value in measured.items() if value is not None and math.isfinite(value)}


def _differences(view: SuiteView, summaries: Mapping[str, Mapping[str, Summary]]) -> dict[str, dict[str, Difference]]:
    differences: dict[str, dict[str, Difference]] = {name: {} for name in view.arms if name != view.baseline}
    for name, metric in [(name, metric) for name in differences for metric in view.metrics]:
        own, other = (summaries[arm].get(metric.key, Summary({})).values for arm in (name, view.baseline))
        if pairs := {seed: own[seed] - other[seed] for seed in own if seed in other}:
            differences[name][metric.key] = Difference(pairs, metric.lower_is_better)
    tested = [(name, key, d.p) for name, by in differences.items() for key, d in by.items() if d.p is not None]
    for (name, key, _), corrected in zip(tested, holm([p for _, _, p in tested]), strict=True):
        each = differences[name][key]
        differences[name][key] = Difference(each.values, each.lower_is_better, corrected)
    return differences


def _difference_json(difference: Difference) -> dict[str, Any]:
    low, high = difference.interval or (None, None)
    return {
        "n": difference.n,
        "mean": difference.mean,
        "error": difference.error,
        "low": low,
        "high": high,
        "p": difference.p,
        "p_holm": difference.holm,
        "verdict": difference.verdict,
        "stands": difference.stands,
        "values": {str(seed): value for seed, value in difference.values.items()},
    }
