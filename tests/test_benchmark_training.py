"""The training benchmark's own code, on tiny models; the first test runs its rows without processes of their own."""

import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from scripts import SCRIPTS, script
from transformers.utils import logging

TINY = ["--lengths", "32", "--vocabulary", "300", "--width", "128", "--layers", "2", "--layout", "1MLA1GDN"]
TINY += ["--steps", "2", "--threads", "1"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = script("training", monkeypatch)
    monkeypatch.setattr(logging, "disable_progress_bar", lambda: None)
    for owner, name in (
        (module.AlignTrainer, "forward_and_backward"),
        (module.ExtendTrainer, "forward_and_backward"),
        (module.Resumable, "clip_gradients"),
        (module.StepMetrics, "on_step_end"),
        (torch.optim.AdamW, "step"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # what a row puts there goes with the test
    return module


def test_rows_train_the_same_pair_and_are_judged(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def here(make: Any, *arguments: Any, threads: int) -> int:
        make(*arguments)()
        return {"align": 2, "extend": 3, "peer": 10}[arguments[0]] << 30

    monkeypatch.setattr(benchmark.measure, "peak_bytes", here)
    console = Console(file=io.StringIO(), width=150)
    benchmark.main([*TINY, "--json", str(tmp_path / "figures.json")], console)
    assert isinstance(console.file, io.StringIO)
    out = console.file.getvalue()
    figures = json.loads((tmp_path / "figures.json").read_text())["lengths"]["32"]
    assert figures["extend"]["loss"] == pytest.approx(figures["peer"]["loss"], rel=1e-4)
    assert figures["align"]["loss"] > 0 and figures["align"]["loss"] != figures["peer"]["loss"]
    for row in ("align", "extend"):
        assert 0 < figures[row]["clipping"] < 1 and 0 < figures[row]["overhead"] < 1
    assert "overhead" not in figures["peer"] and figures["peer"]["tokens_per_second"] > 0
    assert "0.20 times the memory; target 1.3 times the tokens/s or 0.5 times the memory: reached" in out
    assert out.count("the loop adds") == 2 and "32 tokens, hylo, stage 2" in out


def test_figures_leave_the_first_step_out(benchmark: ModuleType) -> None:
    clock = benchmark.Clock()
    clock.ends = [10.0, 12.0, 16.0]
    clock.spans = {
        "forward and backward": [(1.0, 9.0), (10.0, 11.5), (12.0, 15.0)],
        "clipping": [(9.0, 9.5), (11.5, 11.75)],
    }
    figures = clock.figures()
    assert figures == {"steps": [2.0, 4.0], "parts": {"forward and backward": 4.5, "clipping": 0.25}}
    summary = benchmark.summary([figures | {"memory": 7, "loss": 1.0}], 30)
    assert summary["tokens_per_second"] == 10.0
    assert (summary["overhead"], summary["clipping"]) == (pytest.approx(1.25 / 6), pytest.approx(0.25 / 6))


def test_targets(benchmark: ModuleType) -> None:
    peer = {"tokens_per_second": 100.0, "memory": 10.0}

    def judged(**ours: float) -> list[bool]:
        values = {"tokens_per_second": 100.0, "memory": 10.0, "overhead": 0.01, "clipping": 0.0} | ours
        return [line.endswith(": reached") for line in benchmark.targets({"extend": values, "peer": peer}, 64)]

    assert judged() == [False, True]
    assert judged(tokens_per_second=131.0) == [True, True] and judged(memory=5.0) == [True, True]
    assert judged(overhead=0.02, clipping=0.011) == [False, False]


def test_the_script_measures_in_a_fresh_process(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPTS / "training.py"), *TINY, "--rows", "extend", "--json", str(figures)]
    subprocess.run(command, check=True, capture_output=True)
    assert 1 << 20 < json.loads(figures.read_text())["lengths"]["32"]["extend"]["memory"] < 1 << 30
