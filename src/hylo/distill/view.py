"""How a stage in progress looks: a live view on a terminal, ten quiet lines anywhere else."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

QUIET_REPORTS = 10  # lines a stage prints where there is no terminal
REFRESHES = 2  # a second
LAYERS_A_LINE = 6
BARS = "▁▂▃▄▅▆▇█"


class StageView:
    """Shows the figures of the last step (see StepMetrics), tokens/s and time left over the steps of this call.

    `peak` says in words what utilisation is measured against.
    """

    def __init__(self, name: str, steps: int, console: Console) -> None:
        self.name, self.steps, self.console = name, steps, console
        self.peak = ""
        self.figures: dict[str, Any] = {"step": 0}
        self.skipped = 0
        self.checkpoint: int | None = None
        self.first, self.start = 0, time.perf_counter()
        self.live = Live(console=console, get_renderable=self.render, refresh_per_second=REFRESHES, transient=True)

    def __enter__(self) -> "StageView":
        self.began(0)
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()
            self.console.print(f"{self.name}: step {self._at()}", highlight=False)

    def began(self, step: int) -> None:
        """Steps are counted from here on; those before are another call's."""
        self.first, self.start = step, time.perf_counter()
        self.figures["step"] = step

    def step(self, figures: dict[str, Any], skipped: int) -> None:
        self.figures, self.skipped = figures, skipped
        step = figures["step"]
        if not self.console.is_terminal and step * QUIET_REPORTS // self.steps > (
            (step - 1) * QUIET_REPORTS // self.steps
        ):
            left = f"{self.seconds_left():,.0f} s left"
            self.console.print(f"{self.name}: step {self._at()}, {left}", highlight=False, soft_wrap=True)

    def saved(self, step: int) -> None:
        self.checkpoint = step

    def seconds_left(self) -> float:
        step = self.figures["step"]
        return (time.perf_counter() - self.start) / max(1, step - self.first) * (self.steps - step)

    def render(self) -> RenderableType:
        figures, step = self.figures, self.figures["step"]
        head = Table.grid(padding=(0, 2), expand=False)
        left = f"{clock(self.seconds_left())} left" if step > self.first else ""
        bar = ProgressBar(total=self.steps, completed=step, width=40)
        head.add_row(self.name, bar, f"{step} of {self.steps}", left)
        lines: list[RenderableType] = [head]
        if step > self.first:
            lines.append(Text("  ".join([*self._losses(), f"learning rate {figures.get('learning_rate', 0):.2e}"])))
            lines.append(Text("  ".join(self._speed())))
            if "layer_loss" in figures:
                lines.append(layer_table(figures["layer_loss"]))
        return Group(*lines)

    def _at(self) -> str:
        shown = [*self._losses(), *self._speed()] if self.figures["step"] > self.first else []
        return ", ".join([f"{self.figures['step']} of {self.steps}", *shown])

    def _losses(self) -> list[str]:
        figures = self.figures
        total = f"loss {figures['loss']:.4f}" if "loss" in figures else "no loss: step skipped"
        parts = figures.get("losses", {})
        return [total, *(f"{name} {value:.4f}" for name, value in parts.items() if len(parts) > 1)]

    def _speed(self) -> list[str]:
        figures = self.figures
        steps = figures["step"] - self.first
        tokens = figures["tokens"] / figures["step"] * steps
        shown = [f"{tokens / (time.perf_counter() - self.start):,.0f} tokens/s"]
        if "utilisation" in figures:
            shown.append(f"{100 * figures['utilisation']:.0f} % of {self.peak}")
        shown.append(f"{figures['memory'] / 2**30:.1f} GiB")
        if self.skipped:
            shown.append(f"{self.skipped} {'batch' if self.skipped == 1 else 'batches'} skipped")
        if self.checkpoint is not None:
            shown.append(f"saved at step {self.checkpoint}")
        return shown


def layer_table(losses: list[float]) -> Table:
    """Every layer's index and loss, with a bar that shows its share of the largest; a dot if it does not train."""
    table, largest = Table.grid(padding=(0, 2)), max(losses)
    cells = [
        f"{index:>3} {loss:.4f} {BARS[min(7, int(8 * loss / largest))]}" if loss else f"{index:>3} ·"
        for index, loss in enumerate(losses)
    ]
    for start in range(0, len(cells), LAYERS_A_LINE):
        table.add_row(*cells[start : start + LAYERS_A_LINE])
    return table


def clock(seconds: float) -> str:
    """h:mm:ss, without the hours where there are none."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
