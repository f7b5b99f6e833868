"""Aligns in a process of its own: per BASE STUDENT OUT LAYERS_AT_ONCE, prints by how many bytes its memory rose."""

import gc
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from window_rows import WindowRows

from hylo.convert.memory import release_freed
from hylo.distill.align import align
from hylo.distill.settings import Training


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def rows(length: int, count: int) -> WindowRows:
    return WindowRows(np.arange(1000, dtype=np.int32) % 64, length, count, seed=0)


torch.set_num_threads(1)
gc.freeze()  # or every collection would look at all that was imported
for i in range(1, len(sys.argv), 4):
    base, student, out = map(Path, sys.argv[i : i + 3])
    training = Training(
        tokens=16, length=16, rows=1, learning_rate=1e-3, objective="layers", layers_at_once=int(sys.argv[i + 3])
    )
    release_freed()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    before = memory("VmRSS")
    align(base, student, out, rows, training, Console(quiet=True))
    print(memory("VmHWM") - before, flush=True)
