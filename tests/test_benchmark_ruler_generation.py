"""The benchmark of RULER's generation on a tiny model: three ways, one set of answers."""

import io
import json
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console
from scripts import script

TINY = ["--tasks", "niah_single_2", "vt", "--length", "1536", "--samples", "2", "--repeats", "1", "--threads", "1"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, text_file: Path) -> ModuleType:
    module = script("ruler_generation", monkeypatch)
    monkeypatch.setattr(module, "HAYSTACK", text_file)
    return module


def run(benchmark: ModuleType, *arguments: str) -> str:
    console = Console(file=io.StringIO(), width=120)
    benchmark.main([*TINY, *arguments], console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_three_ways_give_the_same_answers(benchmark: ModuleType, tiny_base: Path, tmp_path: Path) -> None:
    out = run(benchmark, "--model", str(tiny_base), "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    tasks = figures["models"][str(tiny_base)]["tasks"]
    assert list(tasks) == ["niah_single_2", "vt"]
    for row in tasks.values():
        assert row["same_answers"] == {"hylo": 2, "single": 2, "batched": 2}
        assert row["seconds"].keys() == {"hylo", "single", "batched"} and min(row["seconds"].values()) > 0
        assert row["answer_tokens"] > 0
    assert tasks["niah_single_2"]["computed"] < 1  # the template and the essays before the first needle
    assert figures["case"] == {"length": 1536, "samples": 2, "repeats": 1}
    assert "tiny-llama at 1536" in out and out.count("times as fast as transformers") == 2 == len(figures["targets"])


def test_ratios_are_medians_over_tasks(benchmark: ModuleType) -> None:
    rows = {
        str(i): {"seconds": {"hylo": 2.0, "single": 2.0 * ratio, "batched": 2.0}} for i, ratio in enumerate((1, 5, 3))
    }
    assert benchmark.medians(rows) == {"single": 3.0, "batched": 1.0}


def test_a_length_too_short_is_refused(
    benchmark: ModuleType, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(benchmark, "--model", str(tiny_base), "--length", "100")
    assert stopped.value.code == 2
    assert "too short for RULER" in capsys.readouterr().err
