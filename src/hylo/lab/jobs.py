"""What a laboratory has to do: a run for every arm and seed, where its files are, and whether it is done.

LAB/recipes/ARM-seed-N.yaml  runs/ARM/seed-N/  results/ARM-seed-N.json  logs/ARM-seed-N.log
LAB/shared/seed-N holds the stages that several arms have in common, LAB/data the tokenised text, LAB/cache the
evaluations' answers.
"""

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hylo.errors import HyloError
from hylo.files import differences, read_json
from hylo.lab.suite import Metric, Suite, recipe_of
from hylo.recipe import Recipe
from hylo.recipe_files import is_hub_name

MASTER, MOMENTS = 4, 8  # bytes a parameter: of what a stage writes, and of what a checkpoint has beside it
GIB = 1 << 30


@dataclass(frozen=True)
class Job:
    """One arm with one seed in the laboratory `lab`."""

    arm: str
    seed: int
    recipe: Recipe
    lab: Path

    @property
    def name(self) -> str:
        return f"{self.arm}-seed-{self.seed}"

    @property
    def run(self) -> Path:
        return self.lab / "runs" / self.arm / f"seed-{self.seed}"

    @property
    def recipe_file(self) -> Path:
        return self.lab / "recipes" / f"{self.name}.yaml"

    @property
    def result_file(self) -> Path:
        return self.lab / "results" / f"{self.name}.json"

    @property
    def log(self) -> Path:
        return self.lab / "logs" / f"{self.name}.log"

    def result(self) -> dict[str, Any] | None:
        """What the run has left. Raises HyloError if that was another recipe's."""
        if not self.result_file.exists():
            return None
        result = read_json(self.result_file, "result")
        theirs, ours = result.get("recipe"), self.recipe.model_dump(mode="json")
        with contextlib.suppress(ValidationError):  # keys that are newer than the result have their defaults
            theirs = Recipe.model_validate(theirs).model_dump(mode="json")
        if differing := differences(theirs, ours):
            raise HyloError(
                f"{self.result_file} is another recipe's ({'; '.join(differing[:4])}); choose another --out, or remove "
                f"{self.result_file} and {self.run}"
            )
        return result

    def done(self, metrics: Sequence[Metric]) -> bool:
        """Whether the run has ended well and says all that is asked of it."""
        result = self.result()
        return result is not None and result["status"] == "done" and {m.key for m in metrics} <= set(result["asked"])


def jobs_of(suite: Suite, path: Path, lab: Path) -> list[Job]:
    """A seed of every arm, then the next seed, so that the arms can be compared as early as may be.

    Raises HyloError for a recipe that is not valid, a model that is not there, a metric that the recipe does not
    evaluate, and results of other recipes.
    """
    jobs = []
    for seed in suite.seeds:
        for name in suite.arms:
            recipe = recipe_of(suite, path, name, seed)
            for model in (recipe.base, recipe.extension_teacher):
                if not is_hub_name(model) and not model.is_dir():
                    raise HyloError(f"arm {name}: model directory {model} does not exist; make it, or name another")
            for metric in suite.measured:
                if metric.length not in recipe.evaluate.lengths:
                    known = ", ".join(map(str, recipe.evaluate.lengths))
                    raise HyloError(
                        f"arm {name}: metric {metric.key} is at a length that its recipe does not evaluate ({known}); "
                        "add it to evaluate.lengths, or leave the metric out"
                    )
            job = Job(name, seed, recipe, lab)
            job.result()
            jobs.append(job)
    return jobs


def disk_bytes(jobs: Sequence[Job], workers: int, keep_models: bool) -> int:
    """What these runs will need at most: every model of a seed (of all, if they are kept), and checkpoints at work.

    Raises HyloError for a layout that does not fit its base.
    """
    by_seed: dict[int, int] = {}
    checkpoints = []
    for job in jobs:
        recipe = job.recipe.with_models(weights=False)
        plan = recipe.plan()
        models = 1 + len(recipe.stages)
        by_seed[job.seed] = by_seed.get(job.seed, 0) + models * plan.parameters_untied * MASTER
        kept = max(stage.keep for stage in recipe.stages) + 1
        checkpoints.append(kept * plan.parameters_untied * (MASTER + MOMENTS))
    models = sum(by_seed.values()) if keep_models else max(by_seed.values(), default=0)
    return models + sum(sorted(checkpoints)[-workers:])


def check_disk(jobs: Sequence[Job], workers: int, keep_models: bool) -> None:
    """Raises HyloError if the disk has not the room that these runs may need."""
    if not jobs:
        return
    lab = jobs[0].lab
    there = next(folder for folder in (lab, *lab.absolute().parents) if folder.exists())
    needed, free = disk_bytes(jobs, workers, keep_models), shutil.disk_usage(there).free
    if needed > free:
        fewer = "leave out --keep-models, " if keep_models else ""
        raise HyloError(
            f"{len(jobs)} runs need up to {needed / GIB:.1f} GiB, and the disk of {lab} has {free / GIB:.1f} GiB; "
            f"{fewer}ask for fewer --arms at a time, or choose another --out"
        )
