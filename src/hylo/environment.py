"""What runs here: versions, devices, and the code chosen for each operation."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hylo.errors import HyloError
from hylo.ops import kernels

PACKAGES = ("hylo", "torch", "transformers", "triton", "flash-linear-attention", "vllm")


def describe() -> dict[str, Any]:
    """{"versions": {package: version or None}, "devices": [...], "kernels": {operation: what runs it}}.

    Raises HyloError for a HYLO_KERNELS that is unknown, or that cannot be.
    """
    try:
        kernels.check_choice()
    except kernels.KernelsError as error:
        raise HyloError(str(error)) from None
    gpu = torch.cuda.is_available()
    if kernels.FORCED == "fla" and not gpu:
        raise HyloError("HYLO_KERNELS=fla needs a GPU, and torch sees none; set it to torch, or unset it")
    device = torch.device("cuda" if gpu else "cpu")
    fla = f"flash-linear-attention {_version('flash-linear-attention')}"
    recurrences = fla if kernels.runs_fla(device) else "torch"
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "threads": torch.get_num_threads(),
        "forced": kernels.FORCED or None,
        "kernels": {
            "gated_delta_rule": recurrences,
            "kimi_delta_rule": recurrences,
            "ssd": recurrences,
            "latent_attention": "torch",
            "short_conv": "torch",
            "divergence": f"triton {_version('triton')}" if kernels.runs_triton(device) else "torch",
        },
    }


def print_environment(found: dict[str, Any], console: Console) -> None:
    table = Table("", "", show_header=False, box=None)
    for name, value in found["versions"].items():
        table.add_row(name, value or "not installed")
    table.add_row("devices", ", ".join(found["devices"]))
    table.add_row("threads", str(found["threads"]))
    table.add_row("HYLO_KERNELS", found["forced"] or "not set")
    for name, value in found["kernels"].items():
        table.add_row(name, value)
    console.print(table)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
