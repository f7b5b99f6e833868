"""How far a run is, read from its files alone: `hylo status RUN` may be asked at any time, also while it is at work.

A run is a directory of `hylo upcycle`, or the OUT of align or extend, which need not be there yet (OUT.training is).
"""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hylo import run_directory
from hylo.distill import checkpoints
from hylo.distill.checkpoints import Checkpoints, training_directory
from hylo.distill.settings import Training
from hylo.distill.view import clock
from hylo.errors import HyloError
from hylo.files import is_locked, read_json
from hylo.recipe import Recipe, read_recipe
from hylo.run_report import NAMES

RECENT = 20  # steps whose speed says how long the others will take
FIGURES = ("step", "loss", "losses", "tokens", "utilisation", "memory", "seconds")


def run_status(run: Path) -> dict[str, Any]:
    """`run`, `alive` (a process is at work in it), `finished`, `parts` and, unless finished, a `command` to go on with.

    Every part has a `name`, a `directory` and a `state`: done, in progress, stopped (begun, but nobody is at work), or
    to come. A stage that was begun also has `steps` and, of its last step, what metrics.jsonl says, `tokens_per_second`
    over the last steps with all that came between them, `seconds_left` at that speed, `skipped` steps, and its newest
    `checkpoint`, judged by its files' sizes (a resume reads every byte); with layers_at_once all of that is the
    `group`'s of layers that is at work. Raises HyloError where there is no run.
    """
    if (run / "recipe.yaml").is_file():
        parts = list(_parts_of_run(run, read_recipe(run / "recipe.yaml")))
        alive = is_locked(run / run_directory.LOCK) or any(part["state"] == "in progress" for part in parts)
        command = f"hylo upcycle {shlex.quote(str(run / 'recipe.yaml'))} --out {shlex.quote(str(run))}"
    elif (run / "metrics.jsonl").is_file() or training_directory(run).is_dir():
        parts = [_stage(run.name, run, None)]
        alive = parts[0]["state"] == "in progress"
        command = None
    else:
        raise HyloError(f"{run} holds no run; give the --out of hylo upcycle, or the OUT of hylo align or extend")
    finished = all(part["state"] == "done" for part in parts)
    if alive and not any(part["state"] == "in progress" for part in parts):
        next(part for part in parts if part["state"] != "done")["state"] = "in progress"
    found = {"run": str(run), "alive": alive, "finished": finished, "parts": parts}
    return found if finished else found | {"command": command}


def print_status(found: dict[str, Any], console: Console) -> None:
    table = Table(title=found["run"], title_justify="left")
    for column in ("", "state", "step", "loss", "tokens/s", "left", "skipped", "saved"):
        table.add_column(column, justify="left" if column in ("", "state") else "right", overflow="fold")
    for part in found["parts"]:
        name = f"{part['name']}, {part['group']}" if "group" in part else part["name"]
        table.add_row(name, part["state"], *_cells(part))
    console.print(table)
    if found["finished"]:
        console.print("finished")
        return
    console.print("a process is at work" if found["alive"] else "no process is at work")
    if not found["alive"]:
        command = found["command"] or "the command that it was begun with, again"
        console.print(f"to go on: {command}", highlight=False, soft_wrap=True)


def _parts_of_run(run: Path, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """In the order in which hylo.pipeline makes them."""
    models = ["teacher", *(["base"] if recipe.extension_teacher != recipe.base else []), "converted"]
    yield _model("convert", run / "converted")
    for stage in recipe.stages:
        yield _stage(stage.directory, run / stage.directory, stage)
        models.append(NAMES.get(stage.kind, stage.directory))
    others = [stage for stage in recipe.stages if stage.kind != "layers"]
    if recipe.controls and others:
        yield _model("control/convert", run / "control" / "converted")
        for arm in ("control", "no_alignment"):
            models.append(arm)
            for stage in others:
                yield _stage(f"{arm}/{stage.directory}", run / arm / stage.directory, stage)
    files = [run / "evaluations" / f"{name}.json" for name in dict.fromkeys(models)]
    there = sum(file.exists() for file in files)
    state = "done" if there == len(files) else "stopped" if there else "to come"
    part = _model("evaluate", run / "evaluations")
    yield part | {"state": state, "step": there, "steps": len(files)}
    yield _model("report", run / "report.html")


def _model(name: str, directory: Path) -> dict[str, Any]:
    return {"name": name, "directory": str(directory), "state": "done" if directory.exists() else "to come"}


def _stage(name: str, out: Path, training: Training | None) -> dict[str, Any]:
    part: dict[str, Any] = _model(name, out)
    work = out if out.exists() else training_directory(out)
    if not work.is_dir():
        return part | ({"steps": training.steps} if training else {})
    if work != out:
        part["state"] = "in progress" if is_locked(work / checkpoints.LOCK) else "stopped"
        identity = work / checkpoints.IDENTITY
        if identity.exists():  # what it was begun with: an arm's stage differs from the recipe's
            training = Training.model_validate(read_json(identity, "description")["training"])
    if group := next(work.glob("groups/*.training"), None):  # alignment of some layers at a time
        part["group"], work = group.stem, group
    recent, skipped = _recent_steps(work / "metrics.jsonl")
    if training:
        part["steps"] = training.steps
    if recent:
        first, last = recent[0], recent[-1]
        part |= {key: last[key] for key in FIGURES if key in last} | {"skipped": skipped}
        steps, seconds = last["step"] - first["step"], last["seconds"] - first["seconds"]
        if not steps:
            steps, seconds = last["step"], last["seconds"]
        part["tokens_per_second"] = round(last["tokens"] / last["step"] * steps / seconds, 1)
        if work != out and training:
            part["seconds_left"] = round((training.steps - last["step"]) * seconds / steps, 1)
    if work != out and (whole := _newest(Checkpoints(work, 1))):
        part["checkpoint"] = str(whole)
    return part


def _recent_steps(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The last finished steps of a metrics.jsonl, oldest first, and how many steps have been skipped in all."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # what follows the last \n is being written
    skipped = next((json.loads(line)["skipped"] for line in reversed(lines) if b'"skipped"' in line), 0)
    return [json.loads(line) for line in lines[-RECENT:]], skipped


def _newest(saved: Checkpoints) -> Path | None:
    return next((saved.path(step) for step in reversed(saved.steps()) if _has_its_files(saved.path(step))), None)


def _has_its_files(checkpoint: Path) -> bool:
    try:
        listed = read_json(checkpoint / checkpoints.CHECKSUMS, "list of checksums")
    except HyloError:
        return False
    paths = {checkpoint / name: file["bytes"] for name, file in listed.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def _cells(part: dict[str, Any]) -> list[str]:
    """Of the table, from the step on."""

    def shown(key: str, form: str) -> str:
        return format(part[key], form) if key in part else ""

    step = f"{part.get('step', 0)} of {part['steps']}" if "steps" in part else shown("step", "d")
    left = clock(part["seconds_left"]) if "seconds_left" in part else ""
    saved = f"step {int(part['checkpoint'].rpartition('-')[2])}" if "checkpoint" in part else ""
    skipped = str(part["skipped"]) if part.get("skipped") else ""
    return [step, shown("loss", ".4f"), shown("tokens_per_second", ",.0f"), left, skipped, saved]
