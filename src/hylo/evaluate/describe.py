"""What is known of a model beside its scores: where it lies, what it is made of, and how its run trained it."""

import math
from pathlib import Path
from typing import Any

import yaml

from hylo.checkpoint import Weights
from hylo.distill.settings import Stage
from hylo.evaluate.served import Served
from hylo.evaluate.subject import Subject
from hylo.files import read_json
from hylo.layout import layout_name


def describe(subject: Subject | Served) -> dict[str, Any]:
    """directory, hash, parameters, context, layout (null for a base), plan and training (null outside of a run)."""
    if isinstance(subject, Served):
        return {
            "address": subject.url,
            "directory": str(subject.directory),
            "hash": subject.hash,
            "parameters": None,
            "context": subject.context,
            "model_type": "served",
            "layout": None,
            "mixers": None,
            "plan": None,
            "training": None,
        }
    config, run = subject.config, run_of(subject.directory)
    mixers = getattr(config, "mixers", None)
    plan = run / "plan.json" if run else None
    return {
        "directory": str(subject.directory),
        "hash": subject.hash,
        "precision": subject.precision,
        "device": subject.device,
        "parameters": parameters_of(subject.directory),
        "context": subject.context,
        "model_type": config.model_type,
        "layout": layout_name(mixers) if mixers else None,
        "mixers": list(mixers) if mixers else None,
        "plan": read_json(plan, "plan") if plan and plan.exists() and mixers else None,
        "training": training_of(subject.directory, run) if run else None,
    }


def parameters_of(directory: Path) -> int:
    """Parameters in the files of a directory: a head that is tied to the embedding counts once."""
    return sum(math.prod(shape) for shape in Weights(directory).shapes.values())


def run_of(directory: Path) -> Path | None:
    """The run that a model lies in: RUN/extended-2048 of its stages, RUN/control/extended-2048 of its controls."""
    folder = directory.resolve()
    return next((parent for parent in folder.parents[:2] if (parent / "recipe.yaml").is_file()), None)


def training_of(directory: Path, run: Path) -> dict[str, Any] | None:
    """How the stages up to `directory` trained; None if the run's recipe has no such stage.

    length and tokens of the longest and of all stages but those of objective layers, whether MLA's positions are
    stretched (yarn), the teacher and its parameters (0 without one), and the run.
    """
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    stages = [Stage.model_validate(stage) for stage in recipe["stages"]]
    names = [stage.directory for stage in stages]
    if directory.name not in names:
        return None
    trained = [stage for stage in stages[: names.index(directory.name) + 1] if stage.kind != "layers"]
    if not trained:
        return None
    last = trained[-1]
    rope = read_json(directory / "config.json", "configuration").get("mla_rope_parameters") or {}
    teacher = None if last.teacher_source == "none" else Path(recipe["teacher"] or recipe["base"])
    known = teacher is not None and (teacher / "config.json").is_file()
    return {
        "run": str(run),
        "arm": directory.resolve().parent.name if directory.resolve().parent != run.resolve() else "",
        "length": max(stage.length for stage in trained),
        "tokens": sum(stage.tokens for stage in trained),
        "yarn": rope.get("rope_type") == "yarn",
        "positions": last.positions,
        "objective": last.objective_text,
        "teacher": teacher.name if teacher else None,
        "teacher_parameters": parameters_of(teacher) if teacher and known else (None if teacher else 0),
        "seed": recipe.get("seed", 0),
    }
