"""Which kernels run: the environment's word, what is installed, and where the tensors are."""

import subprocess
import sys

import pytest
import torch

from hylo.ops import kernels

NAME = "chunk_gated_delta_rule"


class OnGpu:
    """As much of a tensor on a GPU as the choice looks at."""

    device = torch.device("cuda")
    dtype = torch.bfloat16


@pytest.mark.parametrize("forced", ["", "torch"])
def test_tensors_on_the_cpu_stay_with_torch(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FORCED", forced)
    monkeypatch.setattr(kernels, "INSTALLED", True)
    assert kernels.fla_kernel(NAME, torch.zeros(1)) is None


def test_tensors_on_a_gpu_are_handed_over_where_the_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "import_module", lambda module: {"fla.ops.gated_delta_rule": kernels}[module])
    monkeypatch.setattr(kernels, NAME, "the kernel", raising=False)
    for forced, installed, expected in (
        ("", True, "the kernel"),
        ("fla", True, "the kernel"),
        ("", False, None),
        ("torch", True, None),
    ):
        monkeypatch.setattr(kernels, "FORCED", forced)
        monkeypatch.setattr(kernels, "INSTALLED", installed)
        assert kernels.fla_kernel(NAME, OnGpu()) == expected  # type: ignore[arg-type]
    monkeypatch.setattr(OnGpu, "dtype", torch.float64)
    monkeypatch.setattr(kernels, "FORCED", "fla")
    assert kernels.fla_kernel(NAME, OnGpu()) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("forced", "installed", "message"),
    [
        ("fla", True, "HYLO_KERNELS=fla needs tensors on a GPU, got cpu"),
        ("fla", False, "HYLO_KERNELS=fla needs flash-linear-attention; pip install"),
        ("triton", True, "HYLO_KERNELS=triton is unknown; set it to torch or fla"),
    ],
)
def test_what_cannot_be_is_said(forced: str, installed: bool, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FORCED", forced)
    monkeypatch.setattr(kernels, "INSTALLED", installed)
    with pytest.raises(RuntimeError, match=message):
        kernels.fla_kernel(NAME, torch.zeros(1))


def test_nothing_is_imported_before_it_is_needed() -> None:
    """triton itself comes with transformers, where it is installed."""
    code = "import sys, hylo; sys.exit('fla' in sys.modules or 'hylo.ops.divergence_triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
