"""Triton's interpreter is chosen when triton is first imported, so the kernels are tested in a process of their own."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hylo.ops import kernels
from hylo.ops.head_tiles import row_kernels

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_kernels_equal_the_torch_form() -> None:
    cases = Path(__file__).with_name("triton_cases.py")
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-W", "ignore", str(cases)]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_importing_hylo_leaves_the_kernels_alone() -> None:
    code = "import sys, hylo.ops; assert 'hylo.ops.divergence_triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("device", "dtype", "forced", "used"),
    [
        ("cuda", torch.bfloat16, "", True),
        ("cuda", torch.float32, "fla", True),
        ("cuda", torch.float32, "torch", False),
        ("cuda", torch.float64, "", False),
        ("cpu", torch.float32, "", False),
    ],
)
@needs_triton
def test_kernels_are_for_gpus(
    device: str, dtype: torch.dtype, forced: str, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "FORCED", forced)
    monkeypatch.setitem(sys.modules, "hylo.ops.divergence_triton", SimpleNamespace())  # not to import triton here
    monkeypatch.setattr("hylo.ops.divergence_triton", sys.modules["hylo.ops.divergence_triton"], raising=False)
    tensor: Any = SimpleNamespace(device=torch.device(device), dtype=dtype)
    assert (row_kernels(tensor) is not None) == used
