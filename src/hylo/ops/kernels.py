"""Which code runs the recurrences: torch's operations, or flash-linear-attention's kernels on a GPU.

The kernels (MIT, https://github.com/fla-org/flash-linear-attention, version 0.6 or later) run where the package is
installed and tensors are on CUDA or ROCm. HYLO_KERNELS=torch keeps them out, HYLO_KERNELS=fla insists on them.
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


def fla_kernel(name: str, tensor: Tensor) -> Callable[..., Any] | None:
    """flash-linear-attention's function of that name if it should run where `tensor` is; None: torch's operations.

    float64 always stays with torch. Raises KernelsError if HYLO_KERNELS insists on what cannot be.
    """
    on_gpu = tensor.device.type == "cuda"  # ROCm's devices are called so too
    if tensor.dtype == torch.float64 or FORCED == "torch" or (not FORCED and not (on_gpu and INSTALLED)):
        return None
    check_choice()
    if not on_gpu:
        raise KernelsError(f"HYLO_KERNELS=fla needs tensors on a GPU, got {tensor.device}; unset it")
    return getattr(import_module(MODULES[name]), name)
