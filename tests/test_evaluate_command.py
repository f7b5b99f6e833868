"""hylo evaluate and hylo report as a user runs them: several models, a file that grows, a page, and wrong calls."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from command import hylo
from transformers import AutoModelForCausalLM

from hylo.evaluate.progress import Bar

INSIDE = ("--lengths", "128,256", "--answers", 8, "--depths", 2, "--tokens", 512)
RULER = ("--suite", "ruler", "--tasks", "niah_single_1,qa_1", "--samples", 2, "--lengths", "1k", "--beyond-context")


@pytest.fixture(scope="module")
def models(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The base under a name of its own, and a hybrid of it."""
    hybrid = tmp_path_factory.mktemp("models") / "hybrid"
    sets = ("--set", "kv_lora_rank=16", "--set", "q_lora_rank=16", "--set", "qk_rope_head_dim=8")
    done = hylo("convert", tiny_base, hybrid, "--layout", "1MLA2GDN", "--mla-layers", "2", *sets)
    assert done.returncode == 0, done.stderr
    return f"base={tiny_base}", str(hybrid)


def test_several_models_one_table_one_file_one_page(
    models: tuple[str, str], tiny_base: Path, text_file: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results.json"
    asked = (*models, *INSIDE, "--teacher", tiny_base, "--text", text_file, "--json", results)
    done = hylo("evaluate", *asked)
    assert done.returncode == 0, done.stderr
    assert "needle accuracy" in done.stdout and "KL to the teacher" in done.stdout and "hybrid" in done.stdout
    first = json.loads(results.read_text())
    assert list(first["models"]) == ["base", "hybrid"] and first["models"]["hybrid"]["layout"] == "1MLA2GDN"
    assert set(first["suites"]) == {"needle", "intrinsic"} and first["meta"]["versions"]["hylo"]
    hashes = {part["text_hash"] for name in first["suites"] for part in first["suites"][name]["results"].values()}
    assert [len(digest) for digest in hashes] == [64]
    inside = first["suites"]["intrinsic"]["results"]["hybrid"]
    assert len(inside["mixer_error"]) == 3 and inside["memory"]["256"]["cache_bytes_per_token"] > 0
    assert len(first["suites"]["needle"]["results"]["hybrid"]["needle_depth"]["128"]) == 2

    done = hylo("evaluate", *models, *RULER, "--json", results, "--with-published")
    assert done.returncode == 0, done.stderr
    assert "RULER, mean of 1 of 13 tasks" in done.stdout and "Zebra-Llama-1B 4MLA12M2 (quoted)" in done.stdout
    assert "not run: ruler, qa_1: " in done.stdout
    both = json.loads(results.read_text())
    assert both["suites"]["needle"] == first["suites"]["needle"] and len(both["published"]) == 14
    assert both["suites"]["ruler"]["results"]["base"]["scores"]["niah_single_1"]["1024"]["samples"] == 2

    done = hylo("report", results, "--out", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report" / "report.html").read_text()
    assert "niah_single_1" in page and "quoted" in page and "<svg" in page
    assert (tmp_path / "report" / "report.json").exists() and list((tmp_path / "report" / "figures").glob("*.svg"))


def test_answers_are_not_asked_twice(
    models: tuple[str, str], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("evaluate", *models, *INSIDE, "--suite", "needle", "--text", text_file, "--seed", 5, "--json")
    assert hylo(*asked, tmp_path / "a.json").returncode == 0
    monkeypatch.setattr("hylo.evaluate.subject.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert hylo(*asked, tmp_path / "b.json").returncode == 0
    first, second = (json.loads((tmp_path / f"{name}.json").read_text())["suites"] for name in "ab")
    assert first == second


def test_a_signal_ends_it_in_good_order(
    models: tuple[str, str], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("evaluate", models[0], *INSIDE, "--suite", "needle", "--text", text_file, "--seed", 6)
    asked += ("--json", tmp_path / "r.json")
    read: list[int] = []

    def advance(_: Bar, tokens: int) -> None:
        read.append(tokens)
        if len(read) == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Bar, "advance", advance)
    done = hylo(*asked)
    assert done.returncode == 0 and "stopped; go on with: hylo evaluate base=" in done.stdout
    assert not (tmp_path / "r.json").exists() and len(read) == 1
    assert hylo(*asked).returncode == 0 and (tmp_path / "r.json").exists()
    again = sum(read[1:])
    fresh = len(read)
    assert hylo(*asked[:-4], "--seed", 8).returncode == 0
    assert again < sum(read[fresh:])  # what was read before the signal was not read again


def test_without_lengths_those_that_the_context_holds(models: tuple[str, str], text_file: Path, tmp_path: Path) -> None:
    done = hylo(
        "evaluate", models[0], "--suite", "needle", "--answers", 8, "--text", text_file, "--json", tmp_path / "r"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r").read_text())["suites"]["needle"]["settings"]["lengths"] == [512]


def test_bad_calls(models: tuple[str, str], tiny_base: Path, text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    shutil.copytree(tiny_base, other)
    model.save_pretrained(other)
    mixed, text = tmp_path / "mixed.json", tmp_path / "text.json"
    needle = ("--suite", "needle", *INSIDE, "--text", text_file)
    assert hylo("evaluate", models[0], *needle, "--json", mixed).returncode == 0
    text.write_text("no JSON")
    for call, said in (
        ((models[0], "--suite", "ruler,rulr"), "there is no suite 'rulr'; choose from ruler, needle"),
        ((models[0], "--lengths", "1024"), "needle at 1024 tokens exceeds the context of base, 512"),
        ((models[0], "--lengths", "8x"), "--lengths 8x: '8x' is no number of tokens"),
        ((models[0], *RULER, "--tasks", "niah"), "RULER has no task 'niah'; choose from niah_single_1"),
        ((models[0], *RULER, "--lengths", "100"), "niah_single_1 needs"),
        ((models[0], *RULER, "--squad", tmp_path / "none.json"), "none.json does not exist"),
        ((models[0], *RULER, "--through", "helm"), "--through helm: RULER is run by hylo itself or through lm-eval"),
        ((models[0], "--suite", "gsm8k", "--data", tmp_path / "none"), "local copies"),
        ((models[0], f"base={other}", *needle), "two models are called base; name them"),
        ((f"base={other}", *needle, "--json", mixed), "the results hold another model called base"),
        ((models[0], *needle, "--seed", 7, "--json", mixed), "the results hold needle with other settings (seed is 0"),
        ((models[0], *needle, "--json", text), "is not readable JSON"),
        ((tmp_path / "none", *needle), "none does not exist"),
        (("http://127.0.0.1:9/v1", "--suite", "ruler"), "give the directory that has its tokenizer as --tokenizer"),
        (("http://127.0.0.1:9/v1", "--suite", "ruler", "--tokenizer", tiny_base), "no server answers at"),
    ):
        done = hylo("evaluate", *call)
        assert done.returncode == 2 and said in done.stderr, (call, done.stderr)
        assert len(done.stderr.splitlines()) == 1
    for call, said in (
        ((text,), "text.json"),
        ((tmp_path / "none",), "none"),
        ((mixed, tmp_path), str(tmp_path)),
    ):
        done = hylo("report", *call, "--out", tmp_path / "report")
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "report").exists()
