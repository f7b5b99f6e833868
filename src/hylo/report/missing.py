"""Which of the six figures a report lacks, why, and the command that makes each."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hylo.report.collect import completed
from hylo.report.measures import measures
from hylo.report.readings import cells_of, chosen_short
from hylo.report.trained import comparable

UNSCALED = "--set stages.N.positions=unscaled"


class Missing(NamedTuple):
    """`figure`: number and what it shows; `command`: what to run before hylo report."""

    figure: str
    why: str
    command: str


def missing_figures(report: Mapping[str, Any]) -> list[Missing]:
    return list(_missing(completed(dict(report))))


def _missing(report: dict[str, Any]) -> Iterator[Missing]:
    models = " ".join(_words(name, about) for name, about in report["models"].items() if about["role"] != "stage")
    lengths = _lengths(report)
    if chosen_short(report) is None:
        short = next((suite for suite in ("gsm8k", "commonsense") if cells_of(report, suite)), "gsm8k")
        lacking = [suite for suite in ("ruler", short) if not cells_of(report, suite)] or ["ruler", short]
        yield Missing(
            "1: short score against RULER",
            f"no model has {' and '.join(_called(suite) for suite in lacking)}",
            f"hylo evaluate {models} --suite {','.join(lacking)} --lengths {_lengths(report, 2)} --json results.json",
        )
    needle = report["suites"].get("needle", {}).get("results", {})
    if not any(result.get("needle_depth") for result in needle.values()):
        yield Missing(
            "2: needle map",
            "no model has needles by depth",
            f"hylo evaluate {models} --suite needle --lengths {lengths} --json results.json",
        )
    for figure, varying, what, settings in (
        ("3: training length, YaRN on and off", "length", "the length trained at", "--set stages.N.length=LENGTH"),
        ("4: the teacher's size", "teacher_parameters", "the teacher", "--set teacher=DIR"),
    ):
        if why := _untrained(report, varying, what):
            more = f"{settings}, and again with {UNSCALED}" if varying == "length" else settings
            yield Missing(figure, why, f"hylo upcycle RECIPE --out ANOTHER_RUN {more}")
    measured = [p for bench in report["latency"] for model in bench["models"] for p in model["points"] if "ttft" in p]
    if not measured:
        finished = [about for about in report["models"].values() if about["role"] != "stage"]
        directories = " ".join(about["directory"] for about in finished if about.get("directory"))
        yield Missing(
            "5: TTFT and TPOT by length",
            "no bench is among the sources",
            f"hylo bench serve {directories or 'MODEL...'} --lengths {lengths} --out latency",
        )
    if not (report.get("plan") or {}).get("layers"):
        yield Missing("6: the plan", "no model has a run's plan", "hylo upcycle RECIPE --out RUN")
    elif not report.get("initialisation") and any(layer["mixer"] == "mla" for layer in report["plan"]["layers"]):
        yield Missing(
            "6: the energy that MLA's initialisation keeps",
            "no run has converted/initialisation.json",
            "hylo upcycle RECIPE --out RUN",
        )


def _untrained(report: dict[str, Any], varying: str, what: str) -> str:
    """Why figure 3 or 4 is not there; empty where it is."""
    groups = comparable(report, varying)
    if not groups:
        return f"no two runs differ in {what} alone"
    by_score = [m.cells for m in measures(report) if m.suite in ("ruler", "needle")]
    for group in groups.values():
        for cells in by_score:
            if len({training[varying] for training, name in group if name in cells}) > 1:
                return ""
    return "the runs that differ have no RULER or needle score"


def _words(name: str, about: Mapping[str, Any]) -> str:
    """A model as hylo evaluate takes it; one that is known by its name alone stands as that."""
    directory = about.get("directory")
    if not directory:
        return f"{name}=DIR"
    return directory if directory.rpartition("/")[2] == name else f"{name}={directory}"


def _lengths(report: Mapping[str, Any], longest: int = 0) -> str:
    """All lengths of the report, or its `longest` few: RULER's tasks need some room."""
    return ",".join(map(str, report["lengths"][-longest:])) or "8192,16384"


def _called(suite: str) -> str:
    return {"ruler": "RULER", "gsm8k": "GSM8K"}.get(suite, suite)
