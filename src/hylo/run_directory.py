"""A run's directory: it belongs to one recipe and, at a time, to one command; what a killed one left is swept away."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml

from hylo.errors import HyloError
from hylo.files import differences, locked, write_text
from hylo.recipe import Recipe, dump_recipe

LOCK = ".lock"
BEFORE_WORK = (LOCK, "recipe.yaml", "data")  # what a run holds that has made nothing yet, and may change its recipe


@contextlib.contextmanager
def claimed(run: Path, recipe: Recipe) -> Iterator[None]:
    """Holds RUN for this recipe while it lasts; a new directory gets RUN/recipe.yaml.

    Raises HyloError, before anything is written, if RUN holds another recipe's run (and says what differs) or
    something else, or if another command is at work in it.
    """
    check_recipe(run, recipe)
    run.mkdir(parents=True, exist_ok=True)
    busy = f"another command is at work in {run}; wait for it, or choose another --out"
    with locked(run / LOCK, busy):
        write_text(run / "recipe.yaml", dump_recipe(recipe))
        for leftover in run.rglob(".*.partial-*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield


def check_recipe(run: Path, recipe: Recipe) -> None:
    """Raises HyloError if RUN is not this recipe's, or no run at all."""
    path = run / "recipe.yaml"
    if not run.exists() or all(entry.name in BEFORE_WORK or ".partial-" in entry.name for entry in run.iterdir()):
        return
    if not path.exists():
        raise HyloError(f"{run} exists and holds no run; choose another --out")
    text = path.read_text(encoding="utf-8")
    if text == dump_recipe(recipe):
        return
    try:
        theirs = yaml.safe_load(text)
    except yaml.YAMLError:
        raise HyloError(f"{path} is damaged; restore it, or choose another --out") from None
    differing = "; ".join(differences(theirs, yaml.safe_load(dump_recipe(recipe)))[:4])
    raise HyloError(
        f"{path} is another recipe's ({differing}); choose another --out, or go on with the recipe it was made from"
    )
