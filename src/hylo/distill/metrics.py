"""What a stage tells while it runs: metrics.jsonl, TensorBoard events where that is installed, a progress bar."""

import importlib.util
import json
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from hylo.distill.settings import Training

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

QUIET_REPORTS = 10  # lines a stage prints where there is no terminal to draw a bar on


class StepMetrics(TrainerCallback):
    """Writes one line of JSON a step to `out`/metrics.jsonl, at once, and the same figures to `out`/logs.

    Keys: step, loss, layer_loss (alignment), learning_rate, tokens (so far), tokens_per_second (of this step),
    seconds (so far). The stage calls `measured` in every step; the Trainer says when the step is over.
    """

    def __init__(self, out: Path, name: str, training: Training, console: Console) -> None:
        self.out, self.name, self.training, self.console = out, name, training, console
        self.figures: dict[str, Any] = {}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=2,
        )

    def __enter__(self) -> "StepMetrics":
        self.file = (self.out / "metrics.jsonl").open("w", encoding="utf-8")
        self.events = _summary_writer(self.out / "logs")
        self.task: TaskID = self.progress.add_task(self.name, total=self.training.steps, figures="")
        self.progress.start()
        self.start = self.step_start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        self.file.close()
        if self.events is not None:
            self.events.close()

    def measured(self, loss: float, learning_rate: float, layer_loss: list[float] | None = None) -> None:
        self.figures = {"loss": loss, "learning_rate": learning_rate}
        if layer_loss is not None:
            self.figures["layer_loss"] = layer_loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = self.step_start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now, step, step_tokens = time.perf_counter(), state.global_step, self.training.rows * self.training.length
        figures = {
            "step": step,
            **self.figures,
            "tokens": step * step_tokens,
            "tokens_per_second": round(step_tokens / (now - self.step_start), 1),
            "seconds": round(now - self.start, 3),
        }
        self.step_start = now
        self.file.write(json.dumps(figures) + "\n")
        self.file.flush()
        if self.events is not None:
            for key, value in figures.items():
                if key == "layer_loss":
                    for layer, of_layer in enumerate(value):
                        self.events.add_scalar(f"layer_loss/{layer}", of_layer, step)
                elif key not in ("step", "seconds"):
                    self.events.add_scalar(key, value, step)
        self._show(step, figures["loss"], step * step_tokens / (now - self.start), now)

    def _show(self, step: int, loss: float, tokens_per_second: float, now: float) -> None:
        steps = self.training.steps
        shown = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        self.progress.update(self.task, completed=step, figures=shown)
        if not self.console.is_terminal and step * QUIET_REPORTS // steps > (step - 1) * QUIET_REPORTS // steps:
            left = (now - self.start) / step * (steps - step)
            self.console.print(f"{self.name}: step {step} of {steps}, {shown}, {left:,.0f} s left", highlight=False)


def _summary_writer(logs: Path) -> "SummaryWriter | None":
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(logs))
