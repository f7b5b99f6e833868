"""Runs, results and benches become one report; what does not fit together is named with both files."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from results_example import CONTROL, HYBRID, TEACHER, latency, results

from hylo.errors import HyloError
from hylo.evaluate.run import FORMAT
from hylo.report.collect import collect, completed
from hylo.report.reading import EVALUATION
from hylo.report.report import report_of


def written(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def renamed(value: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    value["models"] = {new if name == old else name: about for name, about in value["models"].items()}
    for part in value["suites"].values():
        part["results"] = {new if name == old else name: result for name, result in part["results"].items()}
    return value


def only(value: dict[str, Any], *suites: str) -> dict[str, Any]:
    return value | {"suites": {suite: value["suites"][suite] for suite in suites}}


def test_results_and_a_bench(tmp_path: Path) -> None:
    bench = latency((f"models/{TEACHER}", HYBRID, "another"))
    report = collect([written(tmp_path / "r.json", results()), written(tmp_path / "l.json", bench)])
    assert list(report["models"]) == [TEACHER, HYBRID, CONTROL] and report["hybrid"] == HYBRID
    assert [about["role"] for about in report["models"].values()] == ["teacher", "hybrid", "baseline"]
    assert set(report["suites"]) == {"ruler", "needle", "commonsense", "gsm8k", "intrinsic"}
    assert report["lengths"] == [1024, 2048] and [s["name"] for s in report["stages"]] == list(report["models"])
    assert report["stages"][1]["metrics"]["kl"] == report["suites"]["intrinsic"]["results"][HYBRID]["kl"]
    assert [run["name"] for run in report["runs"]] == [HYBRID] and report["runs"][0]["training"]["length"] == 2048
    # `hybrid` is the end of two directories: neither is meant for sure, so the bench's own name stays
    assert [model["model"] for model in report["latency"][0]["models"]] == [TEACHER, HYBRID, "another"]
    assert report["sources"][0]["settings"]["ruler"]["samples"] == 20
    assert report["sources"][1]["meta"]["device"] == "one CPU"


def test_roles_without_a_known_teacher(tmp_path: Path) -> None:
    value = results((TEACHER, "llama", HYBRID))
    value["suites"]["intrinsic"]["settings"]["teacher"] = None
    value["models"]["llama"]["layout"] = None
    report = collect([written(tmp_path / "r.json", renamed(value, TEACHER, "Llama-1B"))])
    assert {name: about["role"] for name, about in report["models"].items()} == {
        "Llama-1B": "base",
        "llama": "base",
        HYBRID: "hybrid",
    }


def test_one_model_under_two_names(tmp_path: Path) -> None:
    """By its hash: the first file's name is the model's, its results are merged."""
    first = written(tmp_path / "a.json", only(results(), "ruler"))
    second = written(tmp_path / "b.json", renamed(only(results(), "gsm8k"), HYBRID, "mine"))
    report = collect([first, second])
    assert list(report["models"]) == [TEACHER, HYBRID, CONTROL]
    assert list(report["suites"]["gsm8k"]["results"]) == [TEACHER, HYBRID, CONTROL]


def test_one_name_for_two_models(tmp_path: Path) -> None:
    first, other = results(), results()
    other["models"][HYBRID]["hash"] = f"{9:064x}"[::-1]
    paths = [written(tmp_path / "a.json", first), written(tmp_path / "b.json", other)]
    message = rf"{paths[0]} and {paths[1]} hold different models called hybrid \(hash 0{{8}} and 90{{7}}\)"
    with pytest.raises(HyloError, match=message):
        collect(paths)


def test_tasks_of_two_files(tmp_path: Path) -> None:
    """The mean is over all of them, and what one of them ran is not `not run`."""
    first, second = results(), results()
    first["suites"]["ruler"]["not_run"] = {"vt": "left out", "qa_1": "no SQuAD"}
    second["suites"]["ruler"]["settings"]["samples"] = 50
    for name in first["models"]:
        for n in ("1024", "2048"):
            first["suites"]["ruler"]["results"][name]["scores"] = {"cwe": {n: cell(10, 2) for n in ("1024", "2048")}}
            second["suites"]["ruler"]["results"][name]["scores"] = {"vt": {n: cell(40, 4) for n in ("1024", "2048")}}
    second["suites"]["ruler"]["not_run"] = {}
    paths = [written(tmp_path / "a.json", only(first, "ruler")), written(tmp_path / "b.json", only(second, "ruler"))]
    part = collect(paths)["suites"]["ruler"]
    assert part["not_run"] == {"qa_1": "no SQuAD"}
    assert list(part["results"][HYBRID]["scores"]) == ["cwe", "vt"]
    assert part["results"][HYBRID]["mean"]["1024"] == {"score": 25.0, "se": pytest.approx(20**0.5 / 2), "tasks": 2}
    assert "parts" not in part


def cell(score: float, error: float) -> dict[str, Any]:
    return {"score": score, "se": error, "samples": 20, "failed": 0}


def test_other_settings(tmp_path: Path) -> None:
    first, second = results(), results()
    second["suites"]["ruler"]["settings"]["seed"] = 1
    paths = [written(tmp_path / "a.json", first), written(tmp_path / "b.json", second)]
    with pytest.raises(HyloError, match="have ruler with other settings \\(seed is 0 there, 1 here\\)"):
        collect(paths)
    second["suites"]["ruler"]["settings"] |= {"seed": 0, "lengths": [4096], "haystack": "essays"}
    second["suites"]["intrinsic"]["settings"]["teacher"] = None  # measured no KL, which does not clash
    written(paths[1], second)
    assert collect(paths)["suites"]["ruler"]["results"]
    second["suites"]["ruler"]["settings"]["through"] = "lm-eval"
    written(paths[1], second)
    with pytest.raises(HyloError, match="through is None there, lm-eval here"):
        collect(paths)


def test_format_is_the_evaluations() -> None:
    assert EVALUATION == FORMAT


@pytest.mark.parametrize(
    "content, message",
    [
        ("not json", "not readable JSON"),
        ("", "not readable JSON"),
        ([1], "no JSON object"),
        ({}, "holds no results of hylo evaluate"),
        ({"format": "other"}, r"\(format other\)"),
        ({"format": "hylo-evaluation-1", "models": {}, "suites": {}}, "hold no model"),
        ({"format": "hylo-report-1"}, "is a report already"),
        ({"stages": []}, "give the run's directory"),
    ],
)
def test_what_is_no_result(content: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "x.json", content)
    with pytest.raises(HyloError, match=message) as error:
        report_of([path], tmp_path / "out")
    assert str(path) in str(error.value) and not (tmp_path / "out").exists()


def test_directories_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(HyloError, match=f"{tmp_path} is neither a run"):
        collect([tmp_path])
    with pytest.raises(HyloError, match="does not exist"):
        collect([tmp_path / "none"])
    written(tmp_path / "recipe.yaml", "base: x")
    with pytest.raises(HyloError, match="without a report yet"):
        collect([tmp_path])
    written(tmp_path / "report.json", {"format": "hylo-report-1"})
    with pytest.raises(HyloError, match="no report of a run"):
        collect([tmp_path])


RECIPE = """
base: {base}
teacher: null
layout: 1MLA2GDN
data: {{sources: [{{kind: text, paths: [python-stdlib]}}]}}
yarn_original_length: 128
controls: true
stages:
- {{tokens: 640, length: 64, rows: 2, learning_rate: 0.001, objective: layers}}
- {{tokens: 2560, length: 256, rows: 2, learning_rate: 0.001}}
evaluate: {{lengths: [64, 256]}}
"""


def make_run(run: Path, base: Path) -> Path:
    """A finished run whose models are copies of the base that differ in their configuration."""
    written(run / "recipe.yaml", RECIPE.format(base=base))
    for i, directory in enumerate(("converted", "aligned", "extended-256", "control/extended-256")):
        shutil.copytree(base, run / directory)
        config = json.loads((run / directory / "config.json").read_text())
        rope = {"rope_type": "yarn" if "extended" in directory else "default"}
        written(run / directory / "config.json", config | {"note": f"{run.name} {i}", "mla_rope_parameters": rope})
    metrics = {"needle": {"64": 0.5}, "needle_se": {"64": 0.1}, "perplexity": {"64": 9.0}, "meta": {"seed": 0}}
    names = ("teacher", "converted", "aligned", "extended", "control")
    stages = [{"name": name, "metrics": metrics, "tokens": 1, "seconds": 1} for name in names]
    report = {"title": "tiny", "base": "tiny", "layout": "1MLA2GDN", "lengths": [64], "l_short": 64, "l_long": 256}
    report |= {"stages": stages, "training": {}, "checks": [], "meta": {"seed": 0}}
    written(run / "report.json", report)
    return run


def test_a_run(tmp_path: Path, tiny_base: Path) -> None:
    report = collect([make_run(tmp_path / "run", tiny_base)])
    roles = {name: about["role"] for name, about in report["models"].items()}
    assert roles == {
        "teacher": "teacher",
        "converted": "stage",
        "aligned": "stage",
        "extended": "hybrid",
        "control": "baseline",
    }
    assert report["models"]["extended"]["directory"].endswith("run/extended-256")
    assert report["suites"]["needle"]["results"]["control"] == {"needle": {"64": 0.5}, "needle_se": {"64": 0.1}}
    assert report["suites"]["intrinsic"]["results"]["control"] == {"perplexity": {"64": 9.0}}
    (run,) = report["runs"]  # not the control
    expected = {"length": 256, "tokens": 2560, "yarn": True, "teacher": tiny_base.name, "arm": ""}
    assert run["hybrid"] == "extended" and expected.items() <= run["training"].items()
    assert report["title"] == "tiny" and report["meta"] == {"seed": 0}


def test_a_run_and_results_of_its_models(tmp_path: Path, tiny_base: Path) -> None:
    """Under the run's names, by hash; the results' needles go before the run's own, its stages stay."""
    run = make_run(tmp_path / "run", tiny_base)
    (tmp_path / "run" / "converted" / "initialisation.json").write_text('{"init": "pairs"}')
    hashes = {name: about["hash"] for name, about in collect([run])["models"].items()}
    assert len(set(hashes.values())) == 5
    value = only(results((TEACHER, "extended-256"), (64, 256)), "needle", "ruler")
    value["models"][TEACHER]["hash"], value["models"]["extended-256"]["hash"] = hashes["teacher"], hashes["extended"]
    report = collect([run, written(tmp_path / "r.json", value)])
    assert list(report["models"]) == list(hashes) and report["initialisation"] == {"init": "pairs"}
    assert list(report["suites"]["needle"]["results"]) == ["teacher", "extended"]
    assert list(report["suites"]["ruler"]["results"]) == ["teacher", "extended"]
    assert report["stages"][3]["metrics"]["needle"] == {"64": 0.5}


def test_two_runs(tmp_path: Path, tiny_base: Path) -> None:
    """Their models go by RUN/STAGE, but for the one that both have."""
    runs = [make_run(tmp_path / "a" / "run", tiny_base), make_run(tmp_path / "b", tiny_base)]
    report = collect(runs)
    assert [run["name"] for run in report["runs"]] == ["run/extended", "b/extended"]
    assert [stage["name"] for stage in report["stages"]] == ["run/extended", "b/extended"]
    assert "run/teacher" in report["models"] and "b/teacher" not in report["models"]
    assert "training" not in report and report["hybrid"] == "run/extended"


def test_a_run_is_not_written_over(tmp_path: Path, tiny_base: Path) -> None:
    run = make_run(tmp_path / "run", tiny_base)
    with pytest.raises(HyloError, match="choose another --out"):
        report_of([run], run)
    assert "format" not in json.loads((run / "report.json").read_text())


def test_a_runs_own_report_is_completed() -> None:
    stage = {"name": "teacher", "metrics": {"needle": {"64": 1.0}, "kl": {}, "perplexity": {"64": 9.0}}}
    own = {"title": "x", "lengths": [64], "stages": [stage, stage | {"name": "extended"}]}
    report = completed(own)
    assert "models" not in own and report["hybrid"] == "extended"
    assert [about["role"] for about in report["models"].values()] == ["teacher", "hybrid"]
    assert report["suites"]["intrinsic"]["results"]["extended"] == {"perplexity": {"64": 9.0}}
    assert completed(report) == report


def test_a_bench_alone(tmp_path: Path) -> None:
    folder = written(tmp_path / "bench" / "latency.json", latency()).parent
    report = collect([folder])
    assert re.match("Latency of teacher, hybrid", report["title"]) and report["models"] == {}
