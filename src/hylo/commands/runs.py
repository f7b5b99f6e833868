"""hylo upcycle and demo, which run everything, status, which says how far, and env, which says on what."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hylo.commands import shared
from hylo.commands.shared import TrackOption
from hylo.errors import HyloError


def upcycle(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see recipes/")],
    out: Annotated[
        Path | None, typer.Option(help="directory of the run; a second call goes on where the first stopped")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE over the recipe's, e.g. stages.0.tokens=1000; repeatable"),
    ] = None,
    as_published: Annotated[
        bool, typer.Option("--as-published", help="the paper's choices in place of this project's; --set comes after")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="print plan, steps, schedules and memory, and stop; needs config.json only"),
    ] = False,
    devices: Annotated[int, typer.Option(help="of --dry-run: that the run will have", min=1)] = 1,
    track: TrackOption = None,
) -> None:
    """Runs a whole recipe: plan, convert, train every stage, evaluate, report."""
    from hylo.recipe import overrides_of, read_recipe

    read = read_recipe(recipe, overrides_of({}, as_published) + (settings or []))
    if dry_run:
        from hylo.dry_run import dry_run as show

        show(read, shared.console, devices)
        return
    if out is None:
        raise HyloError("upcycle needs --out, the directory of the run")
    from hylo.distill.tracking import tracked
    from hylo.pipeline import upcycle as run

    shared.launch()
    with tracked(track):
        run(read, out, shared.console)


def status(
    run: Annotated[Path, typer.Argument(help="directory of a run, or the OUT of align or extend")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Says how far a run is: stages, step, loss, speed, time left, last checkpoint, and the command that goes on."""
    from hylo.status import print_status, run_status

    found = run_status(run)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print_status(found, shared.console)


def demo(
    out: Annotated[Path, typer.Option(help="directory of the run; a second call goes on where the first stopped")],
    full: Annotated[
        bool, typer.Option("--full/--quick", help="more training and 256 answers in every depth bin")
    ] = False,
) -> None:
    """Upcycles the small checkpoint that comes with the package and checks the result."""
    from hylo.demo import run_demo

    if not run_demo(out, full, shared.console):
        raise typer.Exit(1)


def env(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Prints versions, devices, and which code runs each operation (HYLO_KERNELS=torch or fla forces it)."""
    from hylo.environment import describe, print_environment

    found = describe()
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print_environment(found, shared.console)
