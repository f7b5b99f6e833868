"""One run of a laboratory, in a process of its own: python -m hylo.lab.child JOB.json.

A failure is its process's alone: it ends with one line on standard error and another status than 0.
"""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from hylo.distill import signals
from hylo.errors import HyloError
from hylo.files import read_json, write_json
from hylo.lab.suite import Metric
from hylo.pipeline import Shared, Trained, evaluated, train
from hylo.recipe import Recipe, read_recipe
from hylo.report import read_metrics

STOPPED = 75  # exit status of a run that a signal has ended in good order
BESIDE = ("control", "no_alignment")  # models of a run that are not its result


def run_job(job: dict[str, Any]) -> None:
    """`job`: arm, seed, recipe, run, lab, result, metrics, keep_models; writes the result whole."""
    recipe, run, lab = read_recipe(Path(job["recipe"])), Path(job["run"]), Path(job["lab"])
    metrics = [Metric.parse(key) for key in job["metrics"]]
    began, console = time.monotonic(), Console()

    def measured(done: Trained) -> dict[str, Any]:
        last = [name for name in done.models if name not in BESIDE][-1]
        asked = {metric.model or last for metric in metrics} & done.models.keys()
        models = {name: directory for name, directory in done.models.items() if name in asked}
        results = evaluated(done.recipe, models, done.work, run, console)
        values = {}
        for metric in metrics:
            found = results.get(metric.model or last, {}).get(metric.figure, {})
            if (value := found.get(str(metric.length))) is not None:
                values[metric.key] = value
        return {"metrics": values, "parameters": done.plan.parameters, **_costs(recipe, run)}

    shared = Shared(lab / "data", lab / "shared" / f"seed-{job['seed']}")
    result = train(recipe, run, console, measured, shared)
    about = {"arm": job["arm"], "seed": job["seed"], "status": "done", "wall_seconds": time.monotonic() - began}
    about |= {"asked": job["metrics"], "recipe": recipe.model_dump(mode="json")}
    write_json(Path(job["result"]), about | result)
    if not job["keep_models"]:
        shed(run, recipe)


def shed(run: Path, recipe: Recipe) -> None:
    """Leaves of a run its curves and its evaluations; the models go."""
    for stage in recipe.stages:
        if (metrics := run / stage.directory / "metrics.jsonl").is_file():
            (run / "metrics").mkdir(exist_ok=True)
            shutil.copy(metrics, run / "metrics" / f"{stage.directory}.jsonl")
    for name in ("converted", "stretched", "caches", *BESIDE, *(stage.directory for stage in recipe.stages)):
        shutil.rmtree(run / name, ignore_errors=True)


def _costs(recipe: Recipe, run: Path) -> dict[str, Any]:
    """Tokens and seconds of training, of a stage that several arms share for each of them."""
    curves = [read_metrics(run / stage.directory / "metrics.jsonl") for stage in recipe.stages]
    return {figure: sum(steps[-1][figure] for steps in curves if steps) for figure in ("tokens", "seconds")}


def main() -> None:
    try:
        with signals.watched():
            run_job(read_json(Path(sys.argv[1]), "job"))
    except signals.Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(STOPPED)
    except HyloError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
