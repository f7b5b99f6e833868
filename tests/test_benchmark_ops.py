"""benchmarks/ops.py and benchmarks/teacher_cache.py on sizes small enough for a test."""

import io
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from scripts import script

from hylo.convert import convert
from hylo.plan import make_plan


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")
def test_peers_compute_the_same_and_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = script("ops", monkeypatch)
    cases = [ops.GatedDelta(2, 8, 16), ops.KimiDelta(2, 8, 8), ops.StateSpace(4, 2, 8, 16)]
    rows, steps, growths = [], [], []
    for case in cases:
        for name in ops.PEERS[type(case)]:
            for mine, theirs in zip(ops.run_of("hylo", case, 70)(), ops.run_of(name, case, 70)(), strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)
        with torch.no_grad():
            mine, theirs = ops.step_of("hylo", case)()[0], ops.step_of("transformers", case)()
            theirs = theirs[0] if isinstance(theirs, tuple) else theirs[:, None]
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
        monkeypatch.setattr(ops.measure, "peak_bytes", lambda *arguments, threads: 1 << 20)
        rows += ops.train_rows(case, [32, 64], threads=1)
        growths.append(ops.growth(case, 32, 64, repeats=1))
        steps.append(ops.step_row(case, repeats=2))
    text = io.StringIO()
    ops.report(Console(file=text, width=200), rows, steps)
    assert "SSD, 4 heads of 8, 2 groups, state 16" in text.getvalue()
    lines = ops.targets(rows, growths, steps)
    assert len(lines) == 3 * 2 * 2 + 3 + 3 and all(line.startswith(("reached", "missed")) for line in lines)
    json.dumps([rows, steps, growths])


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")
def test_memory_is_that_of_the_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = script("measure", monkeypatch)
    allocated = measure.peak_bytes(partial, torch.ones, 16 << 20, threads=1)  # of float32
    assert 60 << 20 < allocated < 90 << 20


def test_the_errors_of_a_teacher_cache(
    tiny_base: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher_cache = script("teacher_cache", monkeypatch)
    convert(tiny_base, tmp_path / "student", make_plan(tiny_base, "1MLA2GDN"))
    arguments = [tiny_base, tmp_path / "student", "--tokens", 128, "--length", 64, "--text", text_file, "--facts", 0]
    teacher_cache.main([str(a) for a in (*arguments, "--threads", 1, "--json", tmp_path / "figures.json")])
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["vectors"] for row in rows] == ["float32", "bfloat16"]
    assert rows[0]["token_off_most"] < 1e-5 < rows[1]["token_off_most"]
    assert rows[0]["gradient_off_most"] < 1e-5 < rows[1]["gradient_off_most"]
