"""What the paths given to a report are: runs, results of `hylo evaluate`, results of `hylo bench`; each read as one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hylo.errors import HyloError
from hylo.files import read_json

EVALUATION = "hylo-evaluation-1"
REPORT = "hylo-report-1"
ARMS = ("control", "no_alignment")  # of a run


@dataclass(frozen=True)
class Source:
    """`models` (what is known of each) and `suites` under the names that the source gives its models."""

    path: Path
    kind: str  # run, results or bench
    value: dict[str, Any]
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    suites: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_source(path: Path) -> Source:
    """A run's or a bench's directory, or a JSON file. Raises HyloError for anything else, and says what is expected."""
    if path.is_dir():
        if (path / "report.json").is_file() and (path / "recipe.yaml").is_file():
            return read_run(path)
        if (path / "latency.json").is_file():
            return read_source(path / "latency.json")
        if (path / "recipe.yaml").is_file():
            raise HyloError(f"{path} is a run without a report yet; finish it with hylo upcycle, then report on it")
        raise HyloError(
            f"{path} is neither a run (report.json, recipe.yaml) nor a bench (latency.json); check the path"
        )
    value = read_json(path, "results")
    if value.get("format") == EVALUATION:
        if not value.get("models"):
            raise HyloError(f"results {path} hold no model; run the evaluation again")
        return Source(path, "results", value, value["models"], value["suites"])
    if value.get("kind") in ("serve", "generate") and isinstance(value.get("models"), list):
        return Source(path, "bench", value)
    if value.get("format") == REPORT:
        raise HyloError(f"{path} is a report already; give the runs and results that it was made from")
    if "stages" in value:
        raise HyloError(f"{path} is a run's own report; give the run's directory, {path.parent}")
    expected = "hylo evaluate --json, hylo bench or hylo upcycle"
    raise HyloError(f"{path} (format {value.get('format')}) holds no results of {expected}; choose another file")


def read_run(run: Path) -> Source:
    """A finished run: its report.json, and what is known of the model directories that are still there."""
    report = read_json(run / "report.json", "report")
    if report.get("format") == REPORT or "stages" not in report:
        raise HyloError(f"{run / 'report.json'} is no report of a run; run hylo upcycle again, which writes it anew")
    initialisation = run / "converted" / "initialisation.json"
    if initialisation.is_file():
        report["initialisation"] = read_json(initialisation, "initialisation")
    directories = model_directories(run)
    models = {
        name: (about(name, directories[name]) if name in directories else {"hash": None}) | place
        for name, place in places(report["stages"]).items()
    }
    return Source(run, "run", report, models, suites_of_stages(report["stages"]))


def places(stages: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each model of a run, the stage that it is, and whether it is the one that the run was made for."""
    names = [stage["name"] for stage in stages]
    final = next((name for name in reversed(names) if name not in ARMS), "")
    return {name: {"stage": name, "final": name == final} for name in names}


def about(name: str, directory: Path) -> dict[str, Any]:
    """hylo.evaluate.describe's, or just the directory where it is gone."""
    from hylo.evaluate.describe import describe
    from hylo.evaluate.subject import Subject

    if not (directory / "config.json").is_file():
        return {"directory": str(directory), "hash": None}
    return describe(Subject(name, directory))


def model_directories(run: Path) -> dict[str, Path]:
    """Where the models of a run's report lie, by their names there (hylo.pipeline.Arms)."""
    from hylo.recipe import read_recipe
    from hylo.run_report import NAMES

    recipe = read_recipe(run / "recipe.yaml")
    found = {"teacher": recipe.extension_teacher, "base": recipe.base, "converted": run / "converted"}
    for stage in recipe.stages:
        found[NAMES.get(stage.kind, stage.directory)] = run / stage.directory
    if others := [stage for stage in recipe.stages if stage.kind != "layers"]:
        found |= {arm: run / arm / others[-1].directory for arm in ("control", "no_alignment")}
    return found


def suites_of_stages(stages: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What a run measured of every stage, as the suites needle and intrinsic have it."""
    suites: dict[str, dict[str, Any]] = {}
    for stage in stages:
        metrics = {key: value for key, value in stage["metrics"].items() if value and key not in ("meta", "seconds")}
        needle = {key: value for key, value in metrics.items() if key.startswith("needle")}
        for suite, found in (("needle", needle), ("intrinsic", {k: v for k, v in metrics.items() if k not in needle})):
            if found:
                empty: dict[str, Any] = {"settings": {}, "not_run": {}, "results": {}}
                suites.setdefault(suite, empty)["results"][stage["name"]] = found
    return suites
