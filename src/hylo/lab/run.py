"""Runs a suite: every arm with every seed in a process of its own, some side by side, and compares what comes of it."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console
from rich.table import Table

from hylo.distill import signals
from hylo.errors import HyloError
from hylo.files import locked, read_json, write_json, write_text
from hylo.lab import compare
from hylo.lab.child import STOPPED
from hylo.lab.compare import Comparison, SuiteView
from hylo.lab.jobs import Job, check_disk, jobs_of
from hylo.lab.page import write_lab
from hylo.lab.suite import Suite, read_suite
from hylo.lab.table import table
from hylo.recipe import dump_recipe

LOCK = ".lock"
PATIENCE = 60.0  # seconds that a child has to save and stop, after which it is killed: it loses a few steps


def run_lab(
    path: Path,
    lab: Path,
    console: Console,
    workers: int = 1,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    keep_models: bool = False,
    command: str = "",
) -> Comparison:
    """Runs what is not done of the suite in `path`, `workers` at a time, and compares all that is done.

    `arms` and `seeds` choose some of the suite's. A run that fails is recorded with its reason, the others go on, and
    the next call tries it again. Raises HyloError on bad input before anything runs.
    """
    suite = read_suite(path)
    suite = suite.model_copy(update={"seeds": sorted({*suite.seeds, *(seeds or ())})})
    everything = jobs_of(suite, path, lab)
    jobs = [job for job in jobs_of(chosen(suite, arms, seeds), path, lab) if not job.done(suite.measured)]
    check_disk(jobs, workers, keep_models)
    lab.mkdir(parents=True, exist_ok=True)
    with locked(lab / LOCK, f"another command is at work in {lab}; wait for it, or choose another --out"):
        console.print(f"{suite.title}: {len(jobs)} runs to do, {workers} at a time, in {lab}")
        try:
            Workshop(suite, jobs, workers, keep_models, console).work()
        finally:
            results = [result for job in everything if (result := job.result()) is not None]
            comparison = write_lab(view_of(suite), results, lab, command)
        console.print(table(comparison))
        console.print(f"page: {lab / 'lab.html'}")
    return comparison


def chosen(suite: Suite, arms: Sequence[str] | None, seeds: Sequence[int] | None) -> Suite:
    """The suite with some of its arms and some seeds, which may be others than its own."""
    for name in arms or ():
        if name not in suite.arms:
            raise HyloError(f"--arms: {name} is none of the suite's arms; choose among {', '.join(suite.arms)}")
    picked = {name: arm for name, arm in suite.arms.items() if arms is None or name in arms}
    return suite.model_copy(update={"arms": picked, "seeds": list(suite.seeds if seeds is None else seeds)})


def view_of(suite: Suite) -> SuiteView:
    """What the comparison needs of it."""
    return SuiteView(
        title=suite.title,
        question=suite.question,
        baseline=suite.baseline,
        arms={n: compare.Arm(arm.label or n, arm.note, arm.x, arm.line) for n, arm in suite.arms.items()},
        seeds=suite.seeds,
        metrics=[compare.Metric(m.key, m.label, m.lower_is_better) for m in suite.measured],
        axis=suite.axis,
    )


@dataclass
class Working:
    """A run that is being carried out."""

    job: Job
    process: subprocess.Popen[bytes]
    log: TextIO
    slot: int
    began: float


class Workshop:
    """Keeps `workers` processes busy with `jobs`; a signal stops them in good order and then the whole."""

    def __init__(self, suite: Suite, jobs: Sequence[Job], workers: int, keep_models: bool, console: Console) -> None:
        self.suite, self.jobs, self.keep_models, self.console = suite, list(jobs), keep_models, console
        self.workers = workers
        self.working: list[Working] = []
        self.ended = 0

    def work(self) -> None:
        waiting = list(self.jobs)
        with signals.held():
            while (waiting or self.working) and not signals.requested():
                free = sorted(set(range(self.workers)) - {run.slot for run in self.working})
                for slot in free[: len(waiting)]:
                    self.working.append(self._start(waiting.pop(0), slot))
                time.sleep(0.2)
                for run in [run for run in self.working if run.process.poll() is not None]:
                    self._finish(run)
                    self._clear({job.seed for job in waiting} | {run.job.seed for run in self.working})
            self._stop()

    def _clear(self, needed: set[int]) -> None:
        """What the arms of a seed have shared goes when none of them is still to be run."""
        for seed in {job.seed for job in self.jobs} - needed:
            shutil.rmtree(self.jobs[0].lab / "shared" / f"seed-{seed}", ignore_errors=True)

    def _start(self, job: Job, slot: int) -> Working:
        write_text(job.recipe_file, dump_recipe(job.recipe))
        order = {
            "arm": job.arm,
            "seed": job.seed,
            "recipe": str(job.recipe_file),
            "run": str(job.run),
            "lab": str(job.lab),
            "result": str(job.result_file),
            "metrics": self.suite.metrics,
            "keep_models": self.keep_models,
        }
        file = job.recipe_file.with_suffix(".json")
        write_json(file, order)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        log = job.log.open("w", encoding="utf-8")
        command = [sys.executable, "-m", "hylo.lab.child", str(file)]
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=self._environment(job, slot), start_new_session=True
        )
        return Working(job, process, log, slot, time.monotonic())

    def _environment(self, job: Job, slot: int) -> dict[str, str]:
        """Each process gets its share of the cores and, where there are several, a GPU of its own."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        own = {"HYLO_CACHE": str(job.lab / "cache")}
        if self.workers > 1:
            own["OMP_NUM_THREADS"] = str(max(1, cores // self.workers))
            if (devices := torch.cuda.device_count()) > 1:
                own["CUDA_VISIBLE_DEVICES"] = str(slot % devices)
        return os.environ | own

    def _finish(self, run: Working) -> None:
        self.working.remove(run)
        run.log.close()
        job, status = run.job, run.process.returncode
        seconds = time.monotonic() - run.began
        if status == 0:
            said = read_json(job.result_file, "result")["metrics"]
            outcome = ", ".join(f"{key} {value:.4g}" for key, value in said.items())
        elif status == STOPPED:
            return
        else:
            reason = last_line(job.log) or f"ended with status {status}"
            outcome = f"failed: {reason}"
            failed = {"arm": job.arm, "seed": job.seed, "status": "failed", "reason": reason, "metrics": {}}
            failed |= {"asked": self.suite.metrics, "tokens": 0, "seconds": 0.0, "wall_seconds": seconds}
            failed["recipe"] = job.recipe.model_dump(mode="json")
            write_json(job.result_file, failed)
        self.ended += 1
        style = "" if status == 0 else "red"
        self.console.print(f"{self.ended}/{len(self.jobs)} {job.name} ({seconds:.0f} s): {outcome}", style=style)

    def _stop(self) -> None:
        for run in self.working:
            run.process.terminate()
        for run in list(self.working):
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(PATIENCE)
            if run.process.poll() is None:
                run.process.kill()
                run.process.wait()
            run.log.close()


def last_line(log: Path) -> str:
    """What a process said last."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def show(suite: Suite, jobs: Sequence[Job], console: Console) -> None:
    """What every arm sets, the tokens that it trains on, and how much of it is done."""
    overview = Table(title=suite.title, title_justify="left")
    for column in ("arm", "sets", "tokens", "seeds", "done"):
        overview.add_column(column, overflow="fold", justify="left" if column in ("arm", "sets") else "right")
    for name, arm in suite.arms.items():
        own = [job for job in jobs if job.arm == name]
        tokens = sum(stage.steps * stage.rows * stage.length for stage in own[0].recipe.stages)
        sets = ", ".join(f"{key}={value}" for key, value in arm.set.items())
        published = "as published" if arm.as_published else ""
        done = sum(job.done(suite.measured) for job in own)
        texts = ", ".join(filter(None, (published, sets))) or "nothing"
        overview.add_row(name, texts, f"{tokens:,}", str(len(own)), str(done))
    console.print(overview)
