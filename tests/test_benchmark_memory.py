"""benchmarks/training_memory.py: its stages run, and its verdict can be bad."""

import io
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from scripts import script


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("training_memory", monkeypatch)


def test_both_kinds_of_stage_run_and_have_an_estimate(benchmark: ModuleType, tmp_path: Path) -> None:
    benchmark.write_models(tmp_path, 3, 256, benchmark.TOKENS)
    chosen = [case for case in benchmark.CASES if case.name in ("layers, 1 at once", "forward_kl, packed")]
    for case in chosen:
        assert benchmark.estimate(case, 3, 256).total > 0
        benchmark.run(benchmark.replace(case, training=case.training | {"length": 64, "rows": 1}), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "student", "teacher"]


def figures(benchmark: ModuleType, measured: float, estimated: float) -> dict[str, Any]:
    case = {"case": "one", "measured": measured, "estimated": estimated, "moment": "loss", "parts": {"weights": 1.0}}
    return {"cases": [case]}


@pytest.mark.parametrize(
    ("measured", "estimated", "verdict"),
    [(2.0, 1.7, 0), (2.0, 2.3, 0), (2.0, 1.5, 1), (2.0, 2.5, 1), (0.9, 0.1, 0)],
    ids=["below", "above", "too low", "too high", "too small to count"],
)
def test_an_estimate_may_be_off_by_a_fifth(
    benchmark: ModuleType, measured: float, estimated: float, verdict: int
) -> None:
    console = Console(file=io.StringIO(), width=200)
    found = figures(benchmark, measured * benchmark.GIB, estimated * benchmark.GIB)
    assert benchmark.report(found, None, console) == verdict
    assert ("MISSED: one" in console.file.getvalue()) == bool(verdict)  # type: ignore[attr-defined]
