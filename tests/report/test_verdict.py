"""Better and worse are said of differences beyond two standard errors, and of nothing else."""

import math
from typing import Any

import pytest
from results_example import CONTROL, HYBRID, TEACHER, results

from hylo.report.collect import completed
from hylo.report.measures import Estimate, mean_over_tasks, measures, task_measures
from hylo.report.verdict import BETTER, SAME, WORSE, called, compare, judge, listed, verdict


@pytest.mark.parametrize(
    "own, other, expected",
    [
        (Estimate(50, 3), Estimate(40, 4), SAME),  # 10 is two of 5
        (Estimate(50.1, 3), Estimate(40, 4), BETTER),
        (Estimate(40, 3), Estimate(50.1, 4), WORSE),
        (Estimate(100, 0, 20), Estimate(100, 0, 20), SAME),
        (Estimate(100, 0, 1), Estimate(0, 0, 1), SAME),  # one answer each says nothing
        (Estimate(100, 0, 20), Estimate(0, 0, 20), BETTER),
        (Estimate(math.inf, 1), Estimate(40, 1), SAME),
    ],
)
def test_judge(own: Estimate, other: Estimate, expected: str) -> None:
    assert judge(own, other) == expected
    turned = {BETTER: WORSE, WORSE: BETTER, SAME: SAME}[expected]
    assert judge(other, own) == turned and judge(own, other, higher_is_better=False) == turned


def report(mean: dict[str, Any] | None = None, **suites: Any) -> dict[str, Any]:
    """Two models; `suites`: the results of each."""
    models = {"teacher": {"hash": "a", "layout": None, "directory": "/m/teacher"}}
    models["7MLA"] = {"hash": "b", "layout": "7MLA", "directory": "/m/7MLA"}
    parts = {
        suite: {"settings": {}, "not_run": {}, "results": dict(zip(models, found, strict=True))}
        for suite, found in suites.items()
    }
    return completed({"models": models, "suites": parts})


def ruler(short: float, long: float, tasks: int = 13) -> dict[str, Any]:
    mean = {"8192": {"score": short, "se": 1.0, "tasks": tasks}, "65536": {"score": long, "se": 1.0, "tasks": tasks}}
    return {"scores": {}, "mean": mean}


def gsm8k(score: float) -> dict[str, Any]:
    return {"scores": {}, "mean": {"score": score, "se": 2.0, "tasks": 1}}


def test_paragraph_and_details() -> None:
    found = verdict(report(ruler=[ruler(60, 20), ruler(50, 40)], gsm8k=[gsm8k(50), gsm8k(51)]))
    assert found["paragraph"] == (
        "Against the teacher, the hybrid 7MLA is better in mean RULER at 64K and worse in mean RULER at 8K; there is "
        "no difference that the samples can show in GSM8K."
    )
    assert found["details"] == [
        {
            "against": "the teacher",
            "lines": [
                {"verdict": BETTER, "text": "mean RULER at 64K (40.0 ± 2.0 against 20.0 ± 2.0)"},
                {"verdict": WORSE, "text": "mean RULER at 8K (50.0 ± 2.0 against 60.0 ± 2.0)"},
                {"verdict": SAME, "text": "GSM8K (51.0 ± 3.9 against 50.0 ± 3.9)"},
            ],
        }
    ]
    assert [c["verdict"] for c in found["comparisons"]] == [WORSE, BETTER, SAME]


def test_nothing_to_tell_apart() -> None:
    assert verdict(report(gsm8k=[gsm8k(50), gsm8k(49)]))["paragraph"] == (
        "Against the teacher, the hybrid 7MLA is neither better nor worse: there is no difference that the samples can "
        "show in GSM8K."
    )


def test_what_cannot_be_compared() -> None:
    """Means over other tasks, scores without a standard error, and infinities."""
    intrinsic = [{"perplexity": {"64": 9.0}}, {"perplexity": {"64": 99.0}}]
    found = verdict(report(ruler=[ruler(60, 20), ruler(50, 40, tasks=11)], intrinsic=intrinsic))
    assert found == {"paragraph": "", "details": [], "comparisons": []}


def test_less_perplexity_is_better() -> None:
    def text(value: float) -> dict[str, Any]:
        return {"perplexity": {"64": value}, "perplexity_se": {"64": 0.1}, "kl": {"64": value}, "kl_se": {"64": 0.1}}

    (found,) = verdict(report(intrinsic=[text(9.0), text(8.0)]))["details"]
    assert found["lines"] == [
        {
            "verdict": BETTER,
            "text": "perplexity at 64 (8.000 ± 0.196 against 9.000 ± 0.196); "
            "KL to the teacher at 64 (8.000 ± 0.196 against 9.000 ± 0.196)",
        }
    ]


def test_memory_is_what_was_counted() -> None:
    def held(size: int) -> dict[str, Any]:
        return {"memory": {"64": {"total_bytes": 1}, "1024": {"total_bytes": size}}}

    assert verdict(report(intrinsic=[held(2**20), held(2**18)]))["paragraph"] == (
        "One sequence of 1,024 tokens takes 256 KiB of cache and state in the hybrid 7MLA and 1 MiB in the "
        "teacher: 25 %."
    )


def test_whole_results() -> None:
    whole = completed(results())
    found = verdict(whole)
    assert [other["against"] for other in found["details"]] == ["the teacher", "control/hybrid"]
    by_task = [c for c in found["comparisons"] if c["suite"] == "ruler" and c["task"]]
    assert len(by_task) == 2 * 2 * 12 and {c["against"] for c in by_task} == {TEACHER, CONTROL}
    worse = [c["task"] for c in by_task if (c["against"], c["length"], c["verdict"]) == (TEACHER, "1024", WORSE)]
    (line,) = [part for part in found["details"][0]["lines"] if part["verdict"] == "RULER task by task at 1K"]
    assert line["text"].startswith(f"of 12, {len(worse)} worse ({', '.join(worse)})")
    assert called(whole, HYBRID) == "the hybrid" and called(whole, CONTROL) == CONTROL


def test_measures() -> None:
    whole = completed(results())
    assert [(m.title, m.keys) for m in measures(whole)] == [
        ("mean RULER", ["1024", "2048"]),
        ("mean commonsense", [""]),
        ("GSM8K", [""]),
        ("needle accuracy", ["1024", "2048"]),
        ("perplexity", ["1024", "2048"]),
        ("KL to the teacher", ["1024", "2048"]),
    ]
    assert len(task_measures(whole, "ruler")) == 12 and not task_measures(whole, "needle")
    needle = measures(whole)[3].cells[HYBRID]["1024"]
    own = whole["suites"]["needle"]["results"][HYBRID]
    assert needle == Estimate(100 * own["needle"]["1024"], 100 * own["needle_se"]["1024"], 320)
    assert compare(whole, measures(whole)[-1:])[0].against == CONTROL  # the teacher has no KL to itself


def test_mean_over_tasks() -> None:
    cells = [{"score": 10, "se": 3}, {"score": 20, "se": 4}, {"score": None, "se": None}]
    assert mean_over_tasks(cells) == {"score": 15, "se": 2.5, "tasks": 2}
    assert mean_over_tasks([{"score": 10, "se": None}]) == {"score": 10, "se": None, "tasks": 1}
    assert mean_over_tasks([{"score": None, "se": None}]) == {"score": None, "se": None, "tasks": 0}


def test_listed() -> None:
    assert [listed(["a", "b", "c"][:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
