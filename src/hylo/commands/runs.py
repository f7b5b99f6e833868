"""hylo upcycle and demo, which run everything, and env, which says on what."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hylo.commands import shared


def upcycle(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see recipes/")],
    out: Annotated[Path, typer.Option(help="directory of the run; a second call goes on where the first stopped")],
) -> None:
    """Runs a whole recipe: plan, convert, align, extend, evaluate, report."""
    from hylo.pipeline import upcycle as run
    from hylo.recipe import read_recipe

    run(read_recipe(recipe), out, shared.console)


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
