"""Several models by several suites: one dictionary, the table of it, and what does not belong together."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from hylo.errors import HyloError
from hylo.evaluate.describe import describe
from hylo.evaluate.progress import Bar
from hylo.evaluate.published import published_rows
from hylo.evaluate.run import FORMAT, Suite, evaluate_suites, read_results, subjects_of
from hylo.evaluate.subject import Subject
from hylo.evaluate.table import print_table

SCORES = {"score": 40.0, "se": 5.0, "samples": 10, "failed": 0}


@pytest.fixture
def pair(tiny_base: Path, tmp_path: Path) -> list[str]:
    """Two models of other weights."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    shutil.copytree(tiny_base, tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    return [str(tiny_base), f"second={tmp_path / 'other'}"]


def suite(name: str = "ruler", **settings: Any) -> Suite:
    def run(subject: Subject, bar: Bar) -> tuple[dict[str, Any], dict[str, str]]:
        bar.begin(name, 2)
        bar.advance(2)
        mean = {"512": {"score": 40.0, "se": 5.0, "tasks": 1}}
        return {"scores": {"vt": {"512": SCORES}}, "mean": mean}, {"qa_1": "no data"}

    def check(subject: Subject) -> None:
        subject.check_context([512 * settings.get("times", 1)], name)

    return Suite(name, settings, check, run)


def test_every_model_by_every_suite(pair: list[str]) -> None:
    subjects = subjects_of(pair, "float32")
    result = evaluate_suites(subjects, [suite(), suite("needle")])
    assert list(result["models"]) == ["tiny-llama", "second"] and list(result["suites"]) == ["ruler", "needle"]
    for part in result["suites"].values():
        assert list(part["results"]) == ["tiny-llama", "second"] and part["not_run"] == {"qa_1": "no data"}
    first, second = result["models"].values()
    assert first["hash"] != second["hash"] and first["parameters"] == second["parameters"] > 20_000
    assert first["layout"] is None and first["context"] == 512 and first["training"] is None
    assert result["meta"]["versions"]["torch"] == torch.__version__ and result["format"] == FORMAT
    json.dumps(result)


def test_results_are_added_to(pair: list[str]) -> None:
    subjects = subjects_of(pair, "float32")
    first = evaluate_suites(subjects[:1], [suite(seed=0)])
    both = evaluate_suites(subjects[1:], [suite(seed=0), suite("needle")], json.loads(json.dumps(first)))
    assert list(both["suites"]["ruler"]["results"]) == ["tiny-llama", "second"]
    assert list(both["suites"]["needle"]["results"]) == ["second"] and len(both["models"]) == 2
    with pytest.raises(HyloError, match=r"ruler with other settings \(seed is 0 there, 1 here\)"):
        evaluate_suites(subjects, [suite(seed=1)], both)
    renamed = subjects_of([pair[1].replace("second=", "tiny-llama=")], "float32")
    with pytest.raises(HyloError, match="another model called tiny-llama .*name it otherwise, as NAME=DIR"):
        evaluate_suites(renamed, [suite(seed=0)], both)


def test_what_cannot_be_is_found_before_a_model_is_loaded(pair: list[str]) -> None:
    subjects = subjects_of(pair, "float32")
    with pytest.raises(HyloError, match="ruler at 1024 tokens exceeds the context of tiny-llama, 512"):
        evaluate_suites(subjects, [suite("needle"), suite(times=2)])
    assert not any("model" in subject.__dict__ for subject in subjects)
    evaluate_suites(subjects_of(pair, "float32", beyond=True), [suite(times=2)])
    assert next(iter(subjects)).model is not None
    subjects[0].release()
    assert "model" not in subjects[0].__dict__


def test_models_of_one_name_are_told_apart_by_their_folders() -> None:
    names = [subject.name for subject in subjects_of(["run/extended", "run/control/extended", "a=run/x"], "float32")]
    assert names == ["run/extended", "control/extended", "a"]
    with pytest.raises(HyloError, match="two models are called a"):
        subjects_of(["a=run/extended", "a=other"], "float32")
    with pytest.raises(HyloError, match="precision 'fp8' is unknown"):
        subjects_of(["a"], "fp8")


def test_a_model_of_a_run_says_how_it_was_trained(tiny_base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "control").mkdir(parents=True)
    stages = [
        {"objective": "layers", "length": 64, "rows": 1, "tokens": 128, "learning_rate": 1e-3},
        {"length": 128, "rows": 1, "tokens": 256, "learning_rate": 1e-3, "positions": "unscaled"},
        {"length": 256, "rows": 1, "tokens": 512, "learning_rate": 1e-3, "objective": "cross_entropy"},
    ]
    recipe = {"base": str(tiny_base), "teacher": None, "yarn_original_length": 128, "seed": 3, "stages": stages}
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    for folder in ("aligned", "extended-128", "extended-256", "control/extended-256"):
        shutil.copytree(tiny_base, run / folder)
        rope = {"rope_type": "yarn" if folder.endswith("256") else "default"}
        config = json.loads((run / folder / "config.json").read_text())
        (run / folder / "config.json").write_text(json.dumps(config | {"mla_rope_parameters": rope}))
    said = {folder: describe(Subject("a", run / folder))["training"] for folder in ("aligned", "extended-128")}
    assert said["aligned"] is None
    parameters = describe(Subject("a", tiny_base))["parameters"]
    assert said["extended-128"] == {
        "run": str(run), "arm": "", "length": 128, "tokens": 256, "yarn": False, "positions": "unscaled",
        "objective": "forward_kl", "teacher": "tiny-llama", "teacher_parameters": parameters, "seed": 3,
    }  # fmt: skip
    last = describe(Subject("a", run / "control" / "extended-256"))["training"]
    assert last["arm"] == "control" and last["length"] == 256 and last["tokens"] == 768 and last["yarn"]
    assert last["teacher"] is None and last["teacher_parameters"] == 0


def test_published_rows_are_the_papers() -> None:
    rows = {row["model"]: row for row in published_rows()}
    assert len(rows) == 14 and all("2604.24715" in row["source"] for row in rows.values())
    ours = rows["HyLo-Llama-1B 4MLA12GDN, 64K"]
    assert ours["kv"] == 3.9 and ours["gsm8k"] == 37.5 and ours["commonsense"] == 51.2
    assert ours["ruler"] == {"8192": 52.5, "16384": 48.3, "32768": 44.5, "65536": 40.8}
    assert all(list(row["ruler"]) == ["8192", "16384", "32768", "65536"] for row in rows.values())


def test_one_table() -> None:
    needle = {"needle": {"512": 0.5, "1024": 0.25}, "needle_se": {"512": 0.125, "1024": 0.0}}
    intrinsic = {"perplexity": {"512": 12.345}, "perplexity_se": {"512": 0.5}, "kl": {"512": 0.1}, "kl_se": {}}
    ruler = {"scores": {"vt": {"512": SCORES}}, "mean": {"512": {"score": 40.0, "se": 5.0, "tasks": 1}}}
    gsm8k = {"scores": {}, "mean": {"score": 12.5, "se": 1.5, "tasks": 1}}
    parts = {
        "ruler": {"settings": {"haystack": "stand-in: notes"}, "not_run": {"qa_1": "no SQuAD"}},
        "needle": {},
        "intrinsic": {},
        "gsm8k": {},
    }
    results = {
        "ruler": {"hybrid": ruler},
        "needle": {"hybrid": needle},
        "intrinsic": {"hybrid": intrinsic, "teacher": {"perplexity": {"512": 1.0}}},
        "gsm8k": {"hybrid": gsm8k},
    }
    empty: dict[str, Any] = {"settings": {}, "not_run": {}}
    result = {
        "suites": {name: empty | part | {"results": results[name]} for name, part in parts.items()},
        "published": [{"model": "Quoted-1B", "gsm8k": 37.5, "commonsense": 51.2, "ruler": {"8192": 52.5}}],
    }
    shown = printed(result)
    assert "RULER, mean of 1 of 13 tasks" in shown and "RULER's essays: stand-in: notes" in shown
    cells = [re.split(r"  +", line.strip()) for line in shown.splitlines()]
    assert ["short", "512", "1,024", "8,192"] in cells
    assert ["hybrid", "40.0 (5.0)"] in cells and ["Quoted-1B (quoted)", "52.5"] in cells
    assert ["hybrid", "12.5 (1.5)"] in cells and ["Quoted-1B (quoted)", "37.5"] in cells
    assert ["hybrid", "50.0 (12.5)", "25.0 (0.0)"] in cells
    assert ["hybrid", "12.35 (0.50)"] in cells or ["hybrid", "12.34 (0.50)"] in cells
    assert ["hybrid", "0.1000"] in cells and ["teacher", "1.00"] in cells
    assert "not run: ruler, qa_1: no SQuAD" in shown
    narrow = printed(result, 60)
    assert "…" not in narrow and max(map(len, narrow.splitlines()[:-2])) <= 60
    cells = [re.split(r"  +", line.strip()) for line in narrow.splitlines()]
    assert ["short", "512"] in cells and ["1,024", "8,192"] in cells
    assert ["hybrid", "25.0 (0.0)"] in cells and ["hybrid", "50.0 (12.5)"] in cells
    del result["published"]
    assert "quoted" not in printed(result)


def printed(result: dict[str, Any], width: int = 200) -> str:
    out = io.StringIO()
    print_table(result, Console(file=out, width=width))
    return out.getvalue()


def test_other_files_are_no_results(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text('{"format": "something"}')
    with pytest.raises(HyloError, match="holds no results of hylo evaluate"):
        read_results(path)
    path.write_text(json.dumps({"format": FORMAT, "models": {}}))
    assert read_results(path)["models"] == {}


def test_time_left_is_said_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("hylo.evaluate.progress.time.monotonic", lambda: now[0])
    out = io.StringIO()
    with Bar(Console(file=out, width=200)) as bar:
        bar.begin("ruler of hybrid", 1000)
        now[0] = 30.0
        bar.advance(100)
        assert out.getvalue() == ""
        now[0] = 120.0
        bar.advance(300)
    assert out.getvalue() == "ruler of hybrid: 40 %, 3 tokens/s, 3 min left\n"
