"""A model under measurement that runs out of memory in every way there is."""

import os
import signal

from hylo.serve.child import run
from hylo.serve.latency import Job, Point, measured


class Session:
    about = {"engine": "none"}

    def __init__(self, job: Job) -> None:
        if job.dtype == "broken":
            raise ValueError("this is no model")
        if job.longest > 4096:
            raise ValueError("8 GiB KV cache is needed, which is larger than the available")

    def measure(self, length: int, concurrency: int) -> Point:
        if (length, concurrency) == (4096, 1):
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does
        if (length, concurrency) == (1024, 2):
            raise MemoryError
        return measured((length, concurrency), [[[length / 1000, length / 1000 + 0.5]] * concurrency] * 3)


def main() -> None:
    run(Session)
