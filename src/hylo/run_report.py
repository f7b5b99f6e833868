"""What a run's report says: see hylo.report.write_report for its keys."""

from pathlib import Path
from typing import Any

from hylo.distill.settings import Stage
from hylo.files import read_json
from hylo.plan import Plan
from hylo.recipe import Recipe
from hylo.report import read_metrics

NAMES = {"layers": "aligned", "distill": "extended"}  # of a kind's last stage, in evaluations and the report


def build_report(recipe: Recipe, plan: Plan, run: Path, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`results` has an evaluation for each name of `evaluated`."""
    training: dict[str, dict[str, list[dict[str, Any]]]] = {}
    losses = {}
    for stage in recipe.stages:
        label = curve(stage)
        of_kind = training.setdefault(NAMES.get(stage.kind, stage.directory), {})
        of_kind[label] = read_metrics(run / stage.directory / "metrics.jsonl")
        if stage.kind != "layers" and list(stage.objective) != ["forward_kl"]:
            losses[label] = f"loss ({stage.objective_text})"
        for arm in ("control", "no_alignment") if recipe.controls and stage.kind != "layers" else ():
            steps = read_metrics(run / arm / stage.directory / "metrics.jsonl")
            training.setdefault(arm, {})[f"{arm} {stage.name or stage.length}"] = steps

    def cost(name: str, figure: str) -> float:
        return sum(steps[-1][figure] for steps in training.get(name, {}).values())

    figures = plan.to_json()
    initialisation = run / "converted" / "initialisation.json"
    return {
        "title": f"{recipe.base.name} to {plan.layout}",
        "base": recipe.base.name,
        "layout": plan.layout,
        "plan": figures,
        "kv_percent_of_base": figures["kv_percent_of_base"],
        "lengths": recipe.evaluate.lengths,
        "l_short": recipe.stages[0].length,
        "l_long": max(stage.length for stage in recipe.stages),
        "stages": [
            {
                "name": name,
                "metrics": {"kl": {}} | result,
                "tokens": cost(name, "tokens"),
                "seconds": cost(name, "seconds"),
            }
            for name, result in results.items()
        ],
        "training": {part: steps for parts in training.values() for part, steps in parts.items()},
        "losses": losses,
        "initialisation": read_json(initialisation, "initialisation") if initialisation.is_file() else None,
        "checks": [],
        "meta": list(results.values())[-1]["meta"],
    }


def curve(stage: Stage) -> str:
    """What the report calls a stage's curve."""
    usual = {"layers": "align", "distill": f"extend {stage.length}"}
    return stage.name or usual.get(stage.kind, stage.directory)
