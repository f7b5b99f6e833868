"""How the benchmarks measure: interleaved runs and their medians, peak memory in a process of its own, one table."""

import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

GIB = 1 << 30


def seconds(functions: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Every function's times, taken in turn (a, b, c, a, b, c, ...), so that a busy machine slows all of them."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(make: Callable[..., Callable[[], Any]], *arguments: Any, threads: int = 2) -> int:
    """How far resident memory rises while the function that `make(*arguments)` returns runs once, in a fresh process.

    The inputs, made by `make`, are not counted; what the function returns is. Linux only; `make` must be importable.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak, make, arguments, threads).result()


def _peak(make: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...], threads: int) -> int:
    torch.set_num_threads(threads)
    function = make(*arguments)
    _first_calls()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    result = function()
    after = _status("VmHWM")
    del result
    return after - before


def _first_calls() -> None:
    """Makes the threads and buffers that libraries keep from their first call on."""
    a = torch.eye(64).repeat(8, 1, 1).requires_grad_()
    torch.linalg.solve_triangular(a.bmm(a), a, upper=False).exp().sum().backward()
    torch.nn.functional.linear(a[0], a[1]).sum().backward()


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def machine(threads: int) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].split(": ")[1] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def print_table(console: Console, title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def write_figures(path: Path, figures: dict[str, Any]) -> None:
    """`--json FILE`: whole or not at all."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
