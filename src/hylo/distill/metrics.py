"""What a stage tells while it runs: metrics.jsonl, a live view, and what hylo.distill.tracking is told."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from transformers import PreTrainedConfig, TrainerCallback

from hylo.distill.hardware import peak_flops, peak_memory
from hylo.distill.settings import Training
from hylo.distill.tracking import Tracker, open_trackers
from hylo.distill.view import StageView
from hylo.estimate import stage_flops
from hylo.modeling import HyloConfig
from hylo.parallel import is_main, world_size


class StepMetrics(TrainerCallback):
    """Writes one line of JSON a step to `out`/metrics.jsonl, at once, shows it, and hands it to the trackers.

    Keys: step, loss (of all objectives; missing where it was not finite), losses (by objective, unweighted), layer_loss
    (alignment, by layer), learning_rate, skipped (in the line of a step whose batch was bad: how many were, so far),
    tokens (so far), tokens_per_second (of this step), utilisation (of the devices' peak, if the stage said what it
    `computes`), memory (the most bytes so far on this device), seconds (so far, over all calls). The stage calls
    `measured` in every step, `resume` before the first and `position` when it saves; the Trainer says when a step is
    over. Of several processes only the first writes and shows anything.
    """

    def __init__(self, out: Path, name: str, training: Training, console: Console) -> None:
        self.out, self.name, self.training, self.console = out, name, training, console
        self.step_flops: float | None = None  # on all devices together; see `computes`
        self.figures: dict[str, Any] = {}
        self.trackers: list[Tracker] = []
        self.seconds_before, self.skips = 0.0, 0

    def __enter__(self) -> "StepMetrics":
        self.start = self.step_start = time.perf_counter()
        if is_main():
            self.file = (self.out / "metrics.jsonl").open("ab")
            self.view = StageView(self.name, self.training.steps, self.console)
            self.view.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if is_main():
            self.view.__exit__(kind, error, trace)
            self.file.close()
            for tracker in self.trackers:
                tracker.close()

    def computes(
        self, student: HyloConfig, teacher: PreTrainedConfig | None = None, layers: Sequence[int] | None = None
    ) -> None:
        """What runs in a step, as hylo.estimate.stage_flops takes it: lets utilisation be shown."""
        step_tokens = self.training.rows * self.training.length
        self.step_flops = step_tokens * stage_flops(self.training, student, teacher, layers)

    def measured(
        self,
        loss: float,
        learning_rate: float,
        layer_loss: list[float] | None = None,
        losses: dict[str, float] | None = None,
    ) -> None:
        """The step's mean loss, with what it is made of."""
        self.figures |= {"loss": loss, "learning_rate": learning_rate}
        if layer_loss is not None:
            self.figures["layer_loss"] = layer_loss
        if losses is not None:
            self.figures["losses"] = losses

    def skipped(self, count: int) -> None:
        """This step's batch was bad, as were `count` so far; `measured` is not called if its loss is not finite."""
        self.skips = self.figures["skipped"] = count

    def position(self) -> dict[str, Any]:
        """What `resume` needs to go on from here, once all that is written is on the disk."""
        os.fsync(self.file.fileno())
        return {"bytes": self.file.tell(), "seconds": self._seconds(time.perf_counter()), "skipped": self.skips}

    def resume(self, position: dict[str, Any] | None) -> None:
        """Cuts metrics.jsonl back to what was there at a checkpoint; without a position, to nothing."""
        position = position or {"bytes": 0, "seconds": 0.0, "skipped": 0}
        self.seconds_before, self.skips = position["seconds"], position["skipped"]
        if is_main():
            self.file.truncate(position["bytes"])
            self.file.seek(position["bytes"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if is_main():
            self.trackers = open_trackers(self.out, self.name, self.training, state.global_step)
            if self.step_flops is not None:
                self.peak = peak_flops(self.training.precision)
                self.view.peak = self.peak.described()
            self.view.began(state.global_step)
        self.start = self.step_start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not is_main():
            return
        now, step, step_tokens = time.perf_counter(), state.global_step, self.training.rows * self.training.length
        figures = {
            "step": step,
            **self.figures,
            "tokens": step * step_tokens,
            "tokens_per_second": round(step_tokens / (now - self.step_start), 1),
        }
        if self.step_flops is not None:
            arithmetic = self.step_flops / (now - self.step_start) / world_size()
            figures["utilisation"] = round(arithmetic / self.peak.flops, 4)
        figures |= {"memory": peak_memory(), "seconds": round(self._seconds(now), 3)}
        self.figures, self.step_start = {}, now
        self.file.write(json.dumps(figures).encode() + b"\n")
        self.file.flush()
        for tracker in self.trackers:
            tracker.log(figures)
        self.view.step(figures, self.skips)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if is_main():
            self.view.saved(state.global_step)
        self.step_start = time.perf_counter()  # saving is no part of the next step

    def _seconds(self, now: float) -> float:
        return self.seconds_before + now - self.start
