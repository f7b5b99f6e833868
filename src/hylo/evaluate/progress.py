"""How far an evaluation is: a bar with speed and time left on a terminal, a line now and then anywhere else."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

EVERY_SECONDS = 60.0  # between two lines where there is no terminal


class Bar:
    """`begin` names what starts and how many tokens it will read; `advance` says that some were. On standard error."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), _Speed(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=None)
        self._name, self._total, self._done, self._began, self._said = "", 0, 0, 0.0, 0.0

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def begin(self, name: str, total: int) -> None:
        """`total`: tokens still to read."""
        self._name, self._total, self._done = name, total, 0
        self._began = self._said = time.monotonic()
        self._bar.reset(self._task, description=name, total=total)

    def advance(self, tokens: int) -> None:
        self._done += tokens
        self._bar.advance(self._task, tokens)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._said >= EVERY_SECONDS and self._done:
            left = (now - self._began) * max(0, self._total - self._done) / self._done
            speed = self._done / (now - self._began)
            self._console.print(
                f"{self._name}: {100 * self._done / max(1, self._total):.0f} %, {speed:,.0f} tokens/s, "
                f"{left / 60:.0f} min left"
            )
            self._said = now


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} tokens/s")
