"""Which code runs an operation: torch's operations, or kernels on a GPU.

For the recurrences these are flash-linear-attention's (MIT, https://github.com/fla-org/flash-linear-attention, version
0.6 or later), where that is installed; for losses from hidden states this package's own, where Triton is. They run on
CUDA and ROCm. HYLO_KERNELS=torch keeps both out, HYLO_KERNELS=fla insists on flash-linear-attention.
"""

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

FORCED = os.environ.get("HYLO_KERNELS", "")
INSTALLED = find_spec("fla") is not None
MODULES = {
    "chunk_gated_delta_rule": "fla.ops.gated_delta_rule",
    "fused_recurrent_gated_delta_rule": "fla.ops.gated_delta_rule",
    "chunk_kda": "fla.ops.kda",
    "fused_recurrent_kda": "fla.ops.kda",
    "chunk_simple_gla": "fla.ops.simple_gla",
    "fused_recurrent_simple_gla": "fla.ops.simple_gla",
}


class KernelsError(RuntimeError):
    """HYLO_KERNELS asks for what cannot be."""


def check_choice() -> None:
    """Raises KernelsError for a HYLO_KERNELS that nobody knows, or that wants what is not installed."""
    if FORCED not in ("", "torch", "fla"):
        raise KernelsError(f"HYLO_KERNELS={FORCED} is unknown; set it to torch or fla, or leave it unset")
    if FORCED == "fla" and not INSTALLED:
        raise KernelsError("HYLO_KERNELS=fla needs flash-linear-attention; pip install hylo[cuda], or unset it")


def runs_fla(device: torch.device) -> bool:
    """Whether flash-linear-attention's kernels run on a device."""
    return FORCED != "torch" and INSTALLED and device.type == "cuda"  # ROCm's devices are called so too


def runs_triton(device: torch.device) -> bool:
    """Whether this package's own Triton kernels run on a device."""
    return FORCED != "torch" and device.type == "cuda" and find_spec("triton") is not None


def fla_kernel(name: str, tensor: Tensor) -> Callable[..., Any] | None:
    """flash-linear-attention's function of that name if it should run where `tensor` is; None: torch's operations.

    float64 always stays with torch. Raises KernelsError if HYLO_KERNELS insists on what cannot be.
    """
    if tensor.dtype == torch.float64 or FORCED == "torch":
        return None
    if runs_fla(tensor.device):
        return getattr(import_module(MODULES[name]), name)
    if FORCED:
        check_choice()
        raise KernelsError(f"HYLO_KERNELS=fla needs tensors on a GPU, got {tensor.device}; unset it")
    return None
