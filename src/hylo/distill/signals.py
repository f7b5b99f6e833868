"""SIGTERM and SIGINT: training finishes its step, saves and stops; anything else stops where it is.

The command line runs inside `watched`. Training runs inside `held`, where a signal only becomes `requested`; the loop
looks at that at the end of a step, saves, and raises `Stopped`. Outside of `held` the signal itself raises it.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME = 1.0  # seconds: a terminal and a launcher may both pass on one Ctrl-C


class Stopped(BaseException):  # as KeyboardInterrupt is: nobody's `except Exception` may swallow it
    """A signal ended the run in good order. `step` and `checkpoint` are None where it was not in training."""

    def __init__(self, step: int | None = None, checkpoint: Path | None = None) -> None:
        self.step, self.checkpoint = step, checkpoint
        super().__init__("stopped" if checkpoint is None else f"stopped after step {step}, saved in {checkpoint}")


class _Watch:
    def __init__(self) -> None:
        self.first: float | None = None  # when the first signal came
        self.holding = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first is not None:
            if now - self.first > SAME:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.first = now
        if not self.holding:
            raise Stopped


_watch = _Watch()


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """While it lasts, SIGTERM and SIGINT raise Stopped or, in training, ask for it; a second one kills the process.

    For the main thread alone.
    """
    _watch.first = None
    before = {number: signal.signal(number, _watch) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _watch.first = None


@contextlib.contextmanager
def held() -> Iterator[None]:
    """While it lasts, the first signal only sets `requested`; if it is still set at the end, Stopped is raised then."""
    _watch.holding += 1
    try:
        yield
    finally:
        _watch.holding -= 1
    if requested() and not _watch.holding:
        raise Stopped


def requested() -> bool:
    """Whether a signal came that asks the run to stop."""
    return _watch.first is not None
