"""hylo data inspect: what a recipe's sources hold, what each document contributes, and what makes up a row."""

from pathlib import Path
from typing import Annotated

import typer

from hylo.commands import shared

app = typer.Typer(help="Looks at a recipe's data.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `inspect` a command of its own."""


@app.command()
def inspect(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see recipes/")],
    stage: Annotated[
        str | None, typer.Option(help="by its directory's name, e.g. aligned; the first if left out")
    ] = None,
    row: Annotated[int | None, typer.Option(help="of the stage: which documents make it up", min=0)] = None,
    document: Annotated[int | None, typer.Option(help="of all sources: where its tokens go", min=0)] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe's; repeatable")] = None,
    run: Annotated[Path | None, typer.Option(help="directory of a run, whose tokenised data is used")] = None,
) -> None:
    """Prints the tokens of every source and part, or traces a row or a document."""
    from hylo.data.inspect import inspect as show
    from hylo.recipe import read_recipe

    show(read_recipe(recipe, settings or ()), stage, row, document, run, shared.console)
