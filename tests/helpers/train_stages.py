"""Trains stages one after the other, in as many processes as a launcher started: `train_stages.py JOBS`.

JOBS is a JSON list of {kind: align | extend, base, student, out, training}, and perhaps stop_at: the step after which
the last process, and only that, gets a SIGTERM.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import TrainerCallback
from window_rows import WindowRows

from hylo import parallel
from hylo.distill import signals
from hylo.distill.align import align
from hylo.distill.extend import extend
from hylo.distill.resumable import Resumable
from hylo.distill.settings import Training
from hylo.errors import HyloError

VOCAB = 63


def run_job(job: dict[str, Any]) -> None:
    stream = np.random.default_rng(0).integers(0, VOCAB, 4000).astype(np.int32)
    training = Training.model_validate(job["training"])
    console = Console(quiet=not parallel.is_main(), width=200)

    def rows(length: int, count: int) -> WindowRows:
        return WindowRows(stream, length, count, seed=0)

    base, student, out = (Path(job[key]) for key in ("base", "student", "out"))
    if job["kind"] == "align":
        align(base, student, out, rows, training, console)
    else:
        extend(student, base, out, rows, training, 16, console, out.with_name(f"{out.name}-cache"))


class Interrupt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and parallel.rank() == parallel.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def held(trainer: Resumable) -> dict[str, int]:
    """Numbers of weights, the teacher's weights and the optimizer's moments that this process holds."""

    def count(tensors: Any) -> int:
        return sum(t.to_local().numel() if hasattr(t, "to_local") else t.numel() for t in tensors)

    moments = [t for state in trainer.optimizer.state.values() for name, t in state.items() if name != "step"]
    return {
        "student": count(trainer.student.parameters()),
        "teacher": count(trainer.teacher.parameters()) if trainer.teacher is not None else 0,
        "moments": count(moments),
    }


def main() -> None:
    torch.set_num_threads(1)
    parallel.start()
    train = Resumable.train
    for job in json.loads(sys.argv[1]):

        def watched(self: Resumable, *arguments: Any, job: dict[str, Any] = job, **others: Any) -> Any:
            if "stop_at" in job:
                self.add_callback(Interrupt(job["stop_at"]))
            result = train(self, *arguments, **others)
            tell("held", held(self))
            return result

        Resumable.train = watched  # type: ignore[method-assign]
        try:
            with signals.watched():
                run_job(job)
        except signals.Stopped as stopped:
            tell("stopped", stopped.step)
        except HyloError as error:
            tell("error", str(error))
    parallel.end()


def tell(what: str, value: Any) -> None:
    """A line of JSON in one piece, as the other process writes to the same pipe."""
    os.write(1, (json.dumps([what, value]) + "\n").encode())


if __name__ == "__main__":
    main()
