"""Engines whose workers are processes of their own, one or two to a model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import CLOSE, prompts, reference, write_hybrid

HELPERS = Path(__file__).parents[1] / "helpers"
# Two workers on one memory node: vLLM would want a node for each to bind them to.
TWO = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("layout", "devices"), [("mgs", 1), ("mgs", 2), ("ag", 2)])
def test_answers_are_those_of_generate(layout: str, devices: int, tmp_path: Path) -> None:
    """With two, heads, states and MLPs are shared out by vLLM, the latent is whole on both."""
    directory = write_hybrid(tmp_path / "model", layout)
    said = answers(directory, {"tensor_parallel_size": devices}, TWO if devices > 1 else {})
    for (tokens, logprobs), (own, expected) in zip(said, reference(directory, prompts()), strict=True):
        assert tokens == own
        assert all(abs(p - expected[i, t].item()) < CLOSE for i, (p, t) in enumerate(zip(logprobs, own, strict=True)))


def answers(directory: Path, options: dict[str, Any], environment: dict[str, str]) -> list[Any]:
    done = subprocess.run(
        [sys.executable, str(HELPERS / "ask_engine.py"), str(directory), json.dumps(options)],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(HELPERS)} | environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))
    return list(json.loads(line.removeprefix("ANSWERS ")))
