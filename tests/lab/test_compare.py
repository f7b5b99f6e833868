"""Means, errors and paired differences against hand-made numbers, and Student's t against scipy's."""

import json
import math
from typing import Any

import pytest

from hylo.lab.compare import BETTER, SAME, WORSE, Arm, Comparison, Metric, SuiteView, compare
from hylo.lab.student import critical, holm, two_sided

KL, NEEDLE = Metric("kl@256", "KL at 256", True), Metric("needle@2048", "needle accuracy at 2K", False)


def result(arm: str, seed: int, kl: float | None = None, needle: float | None = None, **other: Any) -> dict[str, Any]:
    metrics = {"kl@256": kl, "needle@2048": needle}
    found = {"arm": arm, "seed": seed, "status": "done", "reason": None, "metrics": metrics, "tokens": 100}
    return found | {"seconds": 2.0} | other


def compared(*arms: list[float | None], metric: Metric = KL, seeds: int = 0) -> Comparison:
    """Arm 0 is the baseline; of every arm its values by seed, None for a run without a result."""
    names = [f"arm {i}" for i in range(len(arms))]
    seeds = seeds or max(map(len, arms))
    view = SuiteView("t", "q", names[0], {name: Arm(name) for name in names}, list(range(seeds)), [metric])
    results = [
        result(name, seed) | {"metrics": {metric.key: value}}
        for name, values in zip(names, arms, strict=True)
        for seed, value in enumerate(values)
        if value is not None
    ]
    return compare(view, results)


def test_mean_and_standard_error_by_hand() -> None:
    summary = compared([2.0, 4.0, 4.0, 6.0]).summaries["arm 0"]["kl@256"]
    assert summary.n == 4 and summary.mean == 4 and summary.values == {0: 2, 1: 4, 2: 4, 3: 6}
    assert summary.error == pytest.approx(math.sqrt(8 / 3) / 2)
    assert compared([2.0]).summaries["arm 0"]["kl@256"].error is None
    assert compared([0.1] * 3).summaries["arm 0"]["kl@256"].error == 0  # no rounding left over


def test_what_all_seeds_share_goes_out_of_the_difference() -> None:
    """Seeds vary by 10, the arm by 1 less in each: the means' errors hide it, the pairs show it."""
    comparison = compared([10.0, 20.0, 30.0], [9.0, 18.9, 29.1])
    assert comparison.summaries["arm 1"]["kl@256"].error == pytest.approx(5.8, abs=0.1)
    difference = comparison.differences["arm 1"]["kl@256"]
    assert difference.mean == pytest.approx(-1)
    assert difference.error == pytest.approx(0.1 / math.sqrt(3))
    assert difference.interval == pytest.approx((-1 - 4.30265 * 0.057735, -1 + 4.30265 * 0.057735), rel=1e-4)
    assert difference.verdict == BETTER
    assert "arm 0" not in comparison.differences


def test_pairs_are_the_seeds_that_both_have() -> None:
    comparison = compared([1.0, 2.0, None, 100.0], [None, 1.0, 50.0, 99.0])
    assert comparison.differences["arm 1"]["kl@256"].values == {1: -1, 3: -1}
    assert comparison.summaries["arm 1"]["kl@256"].n == 3
    assert compared([1.0, None], [None, 1.0]).differences == {"arm 1": {}}


@pytest.mark.parametrize(
    "differences, lower_is_better, verdict",
    [
        ([-1.0, -1.2, -0.8], True, BETTER),
        ([-1.0, -1.2, -0.8], False, WORSE),
        ([1.0, 1.2, 0.8], True, WORSE),
        ([1.0, 1.2, 0.8], False, BETTER),
        ([1.0, -1.2, 0.8], True, SAME),
        ([-1.0], True, SAME),  # one seed has no error
        ([0.0, 0.0], True, SAME),
        ([-1.0, -1.0], True, BETTER),
        ([1.0, 3.0], True, SAME),  # 2 is not beyond two errors of 1
    ],
)
def test_verdicts_need_more_than_two_errors(differences: list[float], lower_is_better: bool, verdict: str) -> None:
    metric = Metric("kl@256", "KL", lower_is_better)
    found = compared([0.0] * len(differences), list(differences), metric=metric)
    assert found.differences["arm 1"]["kl@256"].verdict == verdict


def test_students_t_by_known_numbers() -> None:
    assert two_sided(1, 1) == pytest.approx(0.5)
    assert two_sided(2, 2) == pytest.approx(1 - math.sqrt(2 / 3))
    assert two_sided(0, 3) == 1 and two_sided(math.inf, 3) == 0
    assert [critical(f) for f in (1, 2, 4, 9)] == pytest.approx([12.7062, 4.30265, 2.77645, 2.26216], rel=1e-5)
    assert critical(2000) == pytest.approx(1.9612, abs=1e-4)


def test_students_t_and_the_paired_test_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 5, 8, 17):
        for t in (0.1, 1.0, 2.0, 4.5, 20.0):
            assert two_sided(-t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-9)
        assert critical(freedom, 0.01) == pytest.approx(stats.t.isf(0.005, freedom), rel=1e-9)
    first, second = [0.31, 0.29, 0.35, 0.30, 0.33], [0.30, 0.25, 0.36, 0.27, 0.30]
    difference = compared([*first], [*second]).differences["arm 1"]["kl@256"]
    theirs = stats.ttest_rel(second, first)
    assert difference.p == pytest.approx(theirs.pvalue, rel=1e-9)
    assert difference.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-9)
    assert difference.error == pytest.approx(stats.sem([b - a for a, b in zip(first, second, strict=True)]), rel=1e-9)


def test_seeds_that_differ_alike_are_judged_by_their_number() -> None:
    """The t-test, without a spread to go by, would be certain of it."""
    difference = compared([0.1, 0.2, 0.4], [0.2, 0.3, 0.5]).differences["arm 1"]["kl@256"]
    assert difference.error == 0 and difference.verdict == WORSE  # the floats' own spread is none
    assert difference.p == 0.25 and not difference.stands
    assert compared([0.5] * 3, [0.5] * 3).differences["arm 1"]["kl@256"].p == 1


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1] and holm([]) == []


def test_many_comparisons_let_fewer_stand() -> None:
    near = [-1.0, -1.4, -0.6, -1.1]  # p = 0.008
    noise = [0.1, -0.2, 0.3, -0.25]
    alone = compared([0.0] * 4, [*near])
    assert alone.comparisons == 1 and alone.differences["arm 1"]["kl@256"].stands
    many = compared([0.0] * 4, [*near], *([*noise] for _ in range(9)))
    found = many.differences["arm 1"]["kl@256"]
    assert many.comparisons == 10 and found.verdict == BETTER and not found.stands
    assert found.p is not None and found.holm == pytest.approx(10 * found.p)


def test_how_much_two_errors_say_depends_on_the_seeds() -> None:
    assert compared([0.0] * 2, [1.0, 2.0]).chance == pytest.approx(0.295, abs=1e-3)
    assert compared([0.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]).chance == pytest.approx(0.116, abs=1e-3)
    assert compared([0.0], [1.0]).chance is None


def test_failed_missing_and_unmeasured_are_counted_and_named() -> None:
    view = SuiteView("t", "q", "base", {"base": Arm("Base"), "other": Arm("Other")}, [0, 1, 2], [KL, NEEDLE])
    results = [
        result("base", 0, 0.1, 0.9),
        result("base", 1, 0.2, None),
        result("other", 0, math.inf, 0.8),
        result("other", 2, status="failed", reason="out of memory"),
        result("stranger", 0, 0.3, 0.3),
        result("base", 7, 0.3, 0.3),
    ]
    comparison = compare(view, results)
    base, other = comparison.runs["base"], comparison.runs["other"]
    assert base.done == [0, 1] and base.missing == [2] and base.unmeasured == [(1, "needle@2048")]
    assert other.failed == {2: "out of memory"} and other.missing == [1] and other.unmeasured == [(0, "kl@256")]
    assert (base.tokens, base.seconds) == (200, 4)
    assert set(comparison.runs) == {"base", "other"}
    assert comparison.differences["other"]["needle@2048"].values == {0: pytest.approx(-0.1)}


def test_json_holds_everything() -> None:
    found = json.loads(json.dumps(compared([1.0, 2.0], [2.0, 3.5]).to_json(), allow_nan=False))
    difference = found["arms"]["arm 1"]["metrics"]["kl@256"]["difference"]
    assert difference["mean"] == 1.25 and difference["verdict"] == WORSE and difference["values"] == {"0": 1, "1": 1.5}
    assert difference["low"] < 0 < difference["high"] and difference["p"] == difference["p_holm"]
    assert found["arms"]["arm 0"]["metrics"]["kl@256"]["values"] == {"0": 1, "1": 2}
    assert found["comparisons"] == 1 and found["metrics"][0]["lower_is_better"] is True


def test_nothing_run_yet() -> None:
    comparison = compared([], [], seeds=2)
    assert comparison.comparisons == 0 and comparison.chance is None
    assert comparison.runs["arm 1"].missing == [0, 1]
    json.dumps(comparison.to_json(), allow_nan=False)


def test_shares_are_shown_in_per_cent() -> None:
    assert NEEDLE.title == "needle accuracy at 2K (%)" and KL.title == "KL at 256"
    assert Metric("converted:needle@64", "needles in %", False).scale == 100
    assert Metric("converted:needle@64", "needles in %", False).title == "needles in %"
