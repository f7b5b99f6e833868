"""What the device can do and what the process took of it: arithmetic at its peak, and memory."""

import functools
import resource
import sys
import time
from typing import NamedTuple

import torch

from hylo.distill.settings import Precision

# Dense bf16 with tensor cores and plain float32, in FLOP/s, from NVIDIA's data sheets; the first name that is part of
# the device's counts.
PEAKS = {
    "B200": (2250e12, 75e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}
SIZE, REPEATS = 1024, 4  # of the product that tells where no data sheet does


class Peak(NamedTuple):
    """FLOP/s of one device, and whether they were measured here, for want of a data sheet."""

    flops: float
    measured: bool

    def described(self) -> str:
        size = f"{self.flops / 1e12:,.0f} TFLOP/s" if self.flops >= 1e12 else f"{self.flops / 1e9:,.0f} GFLOP/s"
        return f"a matmul's {size}" if self.measured else size


@functools.cache
def peak_flops(precision: Precision) -> Peak:
    """Of the GPU where there is one, else of this process's threads on the CPU; no random number is drawn."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for part, (bf16, float32) in PEAKS.items():
            if part in name:
                return Peak(bf16 if precision == "bf16" else float32, measured=False)
    return Peak(_measured(precision), measured=True)


def peak_memory() -> int:
    """Bytes: the largest amount so far, allocated on the GPU or, without one, resident in this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else 1024 * resident


def _measured(precision: Precision) -> float:
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8 * SIZE if cuda else SIZE
    a = torch.ones(size, size, dtype=dtype, device="cuda" if cuda else "cpu")
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        a @ a
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return float(2 * size**3 / min(seconds))
