"""The process that measures one model: reads a Job, writes records, and ends with status 137 for want of memory."""

import contextlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from hylo.serve.latency import NO_MEMORY_STATUS, Job, Point

NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "No available memory for the cache",
    "for kv",
    "KV cache is needed",
)


class Session(Protocol):
    """A loaded model. `about` goes into the result."""

    about: dict[str, Any]

    def measure(self, length: int, concurrency: int) -> Point: ...


def run(start: Callable[[Job], Session]) -> None:
    """`python -c ... JOB RESULTS`: starts a session and measures the job's points, a line of RESULTS for each step."""
    values = json.loads(sys.argv[1])
    job = Job(**values | {"points": tuple((length, requests) for length, requests in values["points"])})
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, this process goes, not the parent
    with open(sys.argv[2], "a", buffering=1) as results:

        def record(kind: str, value: Any) -> None:
            results.write(json.dumps([kind, value]) + "\n")

        try:
            session = start(job)
            record("about", session.about)
            for place in job.points:
                record("begin", place)
                if place == job.points[0]:  # once more than the others: threads and allocators settle
                    session.measure(*place)
                record("point", session.measure(*place))
        except Exception as error:
            if not _is_memory(error):
                raise
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(NO_MEMORY_STATUS)


def _is_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in NO_MEMORY)


def prompts(job: Job, length: int, concurrency: int, vocabulary: int, repeat: int) -> list[list[int]]:
    """Random tokens, the same for every model of the same vocabulary; other ones in every repeat."""
    draw = random.Random(f"{job.seed} {length} {concurrency} {repeat}")
    return [[draw.randrange(vocabulary) for _ in range(length - job.new_tokens)] for _ in range(concurrency)]
