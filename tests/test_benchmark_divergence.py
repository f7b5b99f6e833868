"""The divergence benchmark's own code, on a tiny geometry; peers that are not installed are said to be missing."""

import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console
from scripts import SCRIPTS, script

TINY = ["--tokens", "40", "--vocabulary", "300", "--widths", "16", "24", "--repeats", "1", "--threads", "1"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = script("divergence", monkeypatch)
    # A process of its own for every row takes seconds; the last test starts one.
    monkeypatch.setattr(module, "memory", lambda arguments, threads: 2**29)
    return module


def run(benchmark: ModuleType, *arguments: str) -> str:
    console = Console(file=io.StringIO(), width=120)
    benchmark.main([*TINY, *arguments], console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_rows_agree_and_targets_are_judged(benchmark: ModuleType, kind: str, tmp_path: Path) -> None:
    out = run(benchmark, "--kind", kind, "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    losses = [row["loss"] for row in figures["rows"].values()]
    assert {"hylo", "full"} <= figures["rows"].keys() and max(losses) - min(losses) < 1e-5
    assert "memory above inputs and gradients, GiB: 0.50, target at most 0.7: reached" in out
    assert "time, as a multiple of full logits and autograd" in out
    assert figures["case"] == {"tokens": 40, "vocabulary": 300, "widths": [16, 24], "kind": kind}


def test_a_missing_peer_is_named(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "find_spec", lambda package: None)
    out = run(benchmark)
    assert out.count("not installed") == 2


def test_memory_of_one_row(benchmark: ModuleType) -> None:
    out = run(benchmark, "--only-memory", "hylo")
    assert "full logits" not in out and "0.50" in out


def test_the_script_measures_memory_in_a_fresh_process(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    script = [sys.executable, str(SCRIPTS / "divergence.py"), *TINY, "--only-memory", "hylo", "--json", str(figures)]
    subprocess.run(script, check=True, capture_output=True)
    assert 0 < json.loads(figures.read_text())["rows"]["hylo"]["memory"] < 2**29
