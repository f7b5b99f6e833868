"""hylo lab: arms times seeds of a suite, run, compared and shown."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from hylo.commands import shared
from hylo.errors import HyloError


def lab(
    suite: Annotated[Path, typer.Argument(help="YAML file; see suites/")],
    out: Annotated[Path, typer.Option(help="directory of the laboratory; a second call goes on with what is not done")],
    workers: Annotated[int, typer.Option(help="runs side by side, each with its share of the cores", min=1)] = 1,
    arms: Annotated[str | None, typer.Option(help="some of the suite's arms, e.g. default,published")] = None,
    seeds: Annotated[str | None, typer.Option(help="some seeds, e.g. 0,1,2; the suite's if left out")] = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="of finished runs; they leave their figures alone if left out")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print arms, what is done, disk, and stop")] = False,
) -> None:
    """Runs a suite: every arm with every seed, one table and figure with errors and paired differences.

    Ends with status 1 if a run has failed: it is recorded, the others go on, and the same command tries it again.
    """
    from hylo.lab.jobs import GIB, disk_bytes, jobs_of
    from hylo.lab.run import chosen, run_lab, show
    from hylo.lab.suite import read_suite

    names = None if arms is None else [name.strip() for name in arms.split(",")]
    numbers = None if seeds is None else seeds_of(seeds)
    if dry_run:
        read = chosen(read_suite(suite), names, numbers)
        jobs = jobs_of(read, suite, out)
        show(read, jobs, shared.console)
        left = [job for job in jobs if not job.done(read.measured)]
        size = disk_bytes(left, workers, keep_models) / GIB
        shared.console.print(f"{len(left)} of {len(jobs)} runs to do, which may take up to {size:.2f} GiB of disk")
        return
    command = f"hylo {shlex.join(sys.argv[1:])}"
    comparison = run_lab(suite, out, shared.console, workers, names, numbers, keep_models, command)
    if any(runs.failed for runs in comparison.runs.values()):
        raise typer.Exit(1)


def seeds_of(text: str) -> list[int]:
    """0,3,4 as whole numbers, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise HyloError(f"--seeds {text}: write whole numbers such as 0,1,2")
    return sorted({int(part) for part in parts})
