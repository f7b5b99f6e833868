"""The demo: upcycles the checkpoint that comes with the package and holds the result to what the method promises."""

from pathlib import Path
from typing import Any

from rich.console import Console

from hylo.pipeline import upcycle
from hylo.recipe import read_recipe
from hylo.report import write_report

HERE = Path(__file__).parent
TEACHER = HERE / "teacher"


def run_demo(out: Path, full: bool, console: Console) -> bool:
    """Runs the quick or the full recipe in `out`; returns whether every check passed."""
    report = upcycle(read_recipe(HERE / ("full.yaml" if full else "quick.yaml")), out, console)
    report["title"] = f"HyLo demo: a 1.8M-parameter Llama to {report['layout']}"
    report["checks"] = checks(report)
    write_report(out, report)
    for check in report["checks"]:
        mark = "[green]ok[/]" if check["passed"] else "[red]NOT REACHED[/]"
        console.print(f"{mark}  {check['name']}: {check['value']:.4g} ({check['threshold']})")
    return all(check["passed"] for check in report["checks"])


def checks(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What upcycling must reach: retrieval near the teacher's, distillation that helps, conversion that helps."""
    metrics = {stage["name"]: stage["metrics"] for stage in report["stages"]}
    short, long = str(report["l_short"]), str(report["l_long"])
    extended, teacher = metrics["extended"], metrics["teacher"]

    def check(name: str, value: float, bound: float, at_most: bool) -> dict[str, Any]:
        sign = "at most" if at_most else "at least"
        passed = value <= bound if at_most else value >= bound
        return {"name": name, "value": value, "threshold": f"{sign} {bound:.4g}", "passed": passed}

    return [
        check("KV cache, % of the base", report["kv_percent_of_base"], 10, True),
        check(f"needle accuracy at {short}", extended["needle"][short], 0.95 * teacher["needle"][short], False),
        check(f"needle accuracy at {long}", extended["needle"][long], 0.8, False),
        check(
            f"KL at {long}, after extension over after alignment",
            extended["kl"][long] / metrics["aligned"]["kl"][long],
            0.8,
            True,
        ),
        check(
            f"KL at {long}, converted over random mixers, same extension",
            extended["kl"][long] / metrics["control"]["kl"][long],
            0.5,
            True,
        ),
    ]
