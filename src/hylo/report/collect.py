"""What a report is drawn from: runs, results of `hylo evaluate` and of `hylo bench`, merged into one dictionary.

Its keys; a key without data is absent or empty:

title, base, layout, plan (Plan.to_json), kv_percent_of_base, lengths, l_short, l_long
                 of the run, or else of the hybrid among the results; `lengths` are all of needle's and intrinsic's
models           {NAME: {directory, hash, parameters, context, layout, plan, training, role}} in the order to draw;
                 role: teacher, base, hybrid (one: what the report is about), stage (on the way to it), or baseline
hybrid           that NAME
suites           {SUITE: {settings, not_run: {what: why}, results: {NAME: SuiteResult}}}; SUITE of ruler, needle,
                 commonsense, gsm8k, intrinsic; a run's own needle and intrinsic where no results file has the suite
stages           [{name: NAME, metrics: {needle, needle_se, needle_depth, kl, perplexity, ...}, tokens, seconds}]: the
                 run's, in its order; where there is no run, every model with needle or intrinsic results
runs             [{name, directory, layout, models: {stage: NAME}, hybrid: NAME, training: {length, tokens, yarn: bool,
                 teacher: str | None, teacher_parameters: int | None}}]: the hybrid's scores are
                 suites[SUITE]["results"][run["hybrid"]]; also a model of a results file that says how it was trained
training, losses, checks
                 of the run, where there is one only
latency          [result of hylo bench serve or generate, with "source"]
initialisation   the run's converted/initialisation.json
published        rows that the results quote
sources          [{path, kind: run | results | bench, meta, settings: {SUITE: {...}}}]
meta             of the run, where there is one only

`hylo.report.names.looks(report)` says how each model is called and coloured.

Several runs: their stages are called RUN/STAGE. A model that two sources have (by its hash) goes by the first's name.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hylo.errors import HyloError
from hylo.files import differences
from hylo.report.measures import mean_over_tasks
from hylo.report.names import STAGES
from hylo.report.reading import ARMS, REPORT, Source, places, read_source, suites_of_stages

SUITES = ("ruler", "needle", "commonsense", "gsm8k", "intrinsic")
MAY_DIFFER = {"lengths", "tasks", "samples", "limit", "answers", "tokens"}  # in two files of the same suite
OF_A_RUN = ("title", "base", "layout", "plan", "kv_percent_of_base", "l_short", "l_long")
OF_ONE_RUN = ("training", "losses", "checks", "meta")
Report = dict[str, Any]


def collect(paths: Sequence[Path]) -> Report:
    """Reads and merges what lies at `paths`; see above. Raises HyloError for what cannot be read or does not fit."""
    sources = [read_source(path) for path in paths]
    named = _named(sources)
    runs = [source for source in named if source.kind == "run"]
    report: Report = {"format": REPORT}
    if runs:
        report |= {key: runs[0].value[key] for key in OF_A_RUN if key in runs[0].value}
        report |= {key: runs[0].value[key] for key in ("initialisation",) if key in runs[0].value}
    if len(runs) == 1:
        report |= {key: runs[0].value[key] for key in OF_ONE_RUN if key in runs[0].value}
    report["models"] = _models(named)
    report["suites"] = _suites(named)
    if not report["models"] and not any(source.kind == "bench" for source in sources):
        raise HyloError(f"{', '.join(map(str, paths))} hold no results; evaluate a model first")
    report["stages"] = [stage for run in runs for stage in _stages(run, len(runs) > 1)]
    report["latency"] = [_latency(source, report["models"]) for source in sources if source.kind == "bench"]
    report["published"] = next((s.value["published"] for s in sources if s.value.get("published")), [])
    report["sources"] = [_origin(source) for source in sources]
    return completed(report)


def completed(report: Report) -> Report:
    """The report with every key that figures and page ask for; what a run's own report lacks comes from its stages."""
    empty: Report = {"stages": [], "latency": [], "published": [], "sources": [], "checks": []}
    report = empty | report
    if "suites" not in report:
        report["suites"] = suites_of_stages(report["stages"])
    if "models" not in report:
        report["models"] = places(report["stages"])
    teacher = report["suites"].get("intrinsic", {}).get("settings", {}).get("teacher")  # its hash
    report["models"], report["hybrid"] = _with_roles(report["models"], teacher)
    if not report["stages"]:
        report["stages"] = _stages_of_suites(report)
    if not report.get("lengths"):
        report["lengths"] = _lengths(report["suites"])
    report["runs"] = [
        {"name": name, "hybrid": name, "training": about["training"]}
        for name, about in report["models"].items()
        if about.get("training") and _arm(about) not in ARMS
    ]
    hybrid = report["models"].get(report["hybrid"], {})
    own = {"layout": hybrid.get("layout"), "plan": hybrid.get("plan")}
    report |= {key: value for key, value in own.items() if value and key not in report}
    if report.get("plan"):
        report.setdefault("kv_percent_of_base", report["plan"].get("kv_percent_of_base"))
    report.setdefault("title", report["hybrid"] or "Latency of " + ", ".join(_served(report)))
    return report


def _named(sources: list[Source]) -> list[Source]:
    """The sources with each model under one name everywhere. Raises HyloError where a name stands for two models."""
    runs = [source.path for source in sources if source.kind == "run"]
    names_of_hashes: dict[str, str] = {}
    owners: dict[str, tuple[Path, str | None]] = {}
    found = []
    for source in sources:
        own: dict[str, str] = {}
        prefix = f"{_label(source.path, runs)}/" if source.kind == "run" and len(runs) > 1 else ""
        for name, about in source.models.items():
            known = names_of_hashes.get(about["hash"] or "")
            own[name] = known if known and known not in own.values() else prefix + name
            theirs = owners.setdefault(own[name], (source.path, about["hash"]))
            if theirs[0] != source.path and (about["hash"] is None or theirs[1] != about["hash"]):
                hashes = " and ".join((hash or "unknown")[:8] for hash in (theirs[1], about["hash"]))
                raise HyloError(
                    f"{theirs[0]} and {source.path} hold different models called {own[name]} (hash {hashes}); "
                    "evaluate one of them under another name, as NAME=DIR"
                )
        for name, about in source.models.items():
            if about["hash"]:
                names_of_hashes.setdefault(about["hash"], own[name])
        suites = {
            suite: part | {"results": {own[name]: result for name, result in part["results"].items()}}
            for suite, part in source.suites.items()
        }
        models = {own[name]: about for name, about in source.models.items()}
        value = source.value
        if source.kind == "run":
            value = value | {"stages": [stage | {"name": own[stage["name"]]} for stage in value["stages"]]}
        found.append(Source(source.path, source.kind, value, models, suites))
    return found


def _label(run: Path, runs: Sequence[Path]) -> str:
    """A run's name, with its parent's where two are called alike."""
    alike = [other for other in runs if other.resolve().name == run.resolve().name]
    return run.resolve().name if len(alike) == 1 else f"{run.resolve().parent.name}/{run.resolve().name}"


def _models(sources: list[Source]) -> dict[str, dict[str, Any]]:
    models: dict[str, dict[str, Any]] = {}
    for source in sources:
        for name, about in source.models.items():
            models[name] = about | models.get(name, {})
    return models


def _suites(sources: list[Source]) -> dict[str, dict[str, Any]]:
    """Every suite of the results files, merged; needle and intrinsic of runs where no results file has them."""
    merged: dict[str, dict[str, Any]] = {}
    for suite in SUITES:
        parts = [(source, source.suites[suite]) for source in sources if suite in source.suites]
        measured = [(source, part) for source, part in parts if source.kind == "results"] or parts
        for source, part in measured:
            if suite not in merged:
                merged[suite] = {"settings": part["settings"], "not_run": {}, "results": {}, "parts": measured}
                first = source
            if unlike := _clashes(merged[suite]["settings"], part["settings"]):
                raise HyloError(
                    f"{first.path} and {source.path} have {suite} with other settings ({'; '.join(unlike[:3])}); "
                    "report on them apart"
                )
            merged[suite]["not_run"] |= part["not_run"]
            for name, result in part["results"].items():
                merged[suite]["results"][name] = _merged(merged[suite]["results"].get(name, {}), result)
    for suite, part in merged.items():
        done = {task for result in part["results"].values() for task in result.get("scores", {})}
        if len(part.pop("parts")) > 1:
            for result in part["results"].values():
                _average(suite, result)
        part["not_run"] = {what: why for what, why in part["not_run"].items() if what not in done}
    return merged


def _clashes(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Where two files asked differently; what only one of them has, a teacher or a source of text, is no clash."""
    found = differences({"through": theirs.get("through")}, {"through": ours.get("through")})
    for key in [key for key in theirs if key in ours and key not in MAY_DIFFER]:
        if _are_mappings(theirs[key], ours[key]):
            found += [f"{key}.{line}" for line in _clashes(theirs[key], ours[key])]
        elif None not in (theirs[key], ours[key]):
            found += differences({key: theirs[key]}, {key: ours[key]})
    return found


def _average(suite: str, result: dict[str, Any]) -> None:
    """The mean anew, where two files may have scored different tasks."""
    scores = list(result.get("scores", {}).values())
    if suite == "ruler":
        lengths = dict.fromkeys(length for by_length in scores for length in by_length)
        result["mean"] = {n: mean_over_tasks([by[n] for by in scores if n in by]) for n in lengths}
    elif scores:
        result["mean"] = mean_over_tasks(scores)


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries as one; where both have a value, the second's stays."""
    both = {key: _merged(first[key], second[key]) for key in first if _are_mappings(first[key], second.get(key))}
    return {**first, **second, **both}


def _are_mappings(*values: Any) -> bool:
    return all(isinstance(value, Mapping) for value in values)


def _with_roles(models: dict[str, dict[str, Any]], teacher: str | None = None) -> tuple[dict[str, dict[str, Any]], str]:
    """Each with its role, in the order to draw: teacher (by its hash), base, stages, the hybrid, baselines; and the
    hybrid's name: a run's finished model, else the first of a hybrid layout, else the last."""
    finals = [name for name, about in models.items() if about.get("final", name == "extended")]
    made = [name for name, about in models.items() if about.get("layout") and _arm(about) not in ARMS]
    hybrid = next(iter(finals + made), next(reversed(models), ""))
    found = {}
    for name, about in models.items():
        stage = about.get("stage", name if name in STAGES else None)
        if name == hybrid:
            role = "hybrid"
        elif stage in ("teacher", "base"):
            role = stage
        elif stage and stage not in ARMS and name not in finals:
            role = "stage"
        elif not stage and about.get("layout") is None:
            role = "teacher" if about["hash"] == teacher else "base"
        else:
            role = "baseline"
        found[name] = about | {"role": role}
    order = ["teacher", "base", "stage", "hybrid", "baseline"]
    return dict(sorted(found.items(), key=lambda item: order.index(item[1]["role"]))), hybrid


def _arm(about: Mapping[str, Any]) -> str:
    return (about.get("training") or {}).get("arm", "")


def _stages(run: Source, only_final: bool) -> list[dict[str, Any]]:
    """A run's stages; of several runs, each one's finished model."""
    stages = run.value["stages"]
    return [stage for stage in stages if not only_final or run.models[stage["name"]]["final"]]


def _stages_of_suites(report: Report) -> list[dict[str, Any]]:
    results = [report["suites"].get(suite, {}).get("results", {}) for suite in ("needle", "intrinsic")]
    return [
        {"name": name, "metrics": {key: value for part in results for key, value in part.get(name, {}).items()}}
        for name in report["models"]
        if any(name in part for part in results)
    ]


def _lengths(suites: Mapping[str, Any]) -> list[int]:
    """Every length of needle's and intrinsic's results."""
    found = set()
    for suite, keys in (("needle", ("needle",)), ("intrinsic", ("perplexity", "kl"))):
        for result in suites.get(suite, {}).get("results", {}).values():
            found |= {int(length) for key in keys for length in result.get(key) or {}}
    return sorted(found)


def _origin(source: Source) -> dict[str, Any]:
    """Where figures come from, and how they were measured."""
    settings = {suite: part["settings"] for suite, part in source.suites.items() if part["settings"]}
    meta = dict(source.value.get("meta") or {})
    if source.kind == "bench":
        meta = {key: source.value[key] for key in ("device", "cores", "versions") if key in source.value}
        settings = {f"bench {source.value['kind']}": source.value["settings"]}
    return {"path": str(source.path), "kind": source.kind, "meta": meta, "settings": settings}


def _served(report: Report) -> list[str]:
    return list(dict.fromkeys(model["model"] for bench in report["latency"] for model in bench["models"]))


def _latency(source: Source, models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A bench's result; its models are called as elsewhere in the report where their directories' names say which."""

    def name(model: Mapping[str, Any]) -> str:
        folders = {known: Path(about["directory"]).parts for known, about in models.items() if about.get("directory")}
        tail = tuple(model["model"].split("/"))
        fits = [known for known, parts in folders.items() if parts[-len(tail) :] == tail]
        return fits[0] if len(fits) == 1 else model["model"]

    return source.value | {
        "models": [model | {"model": name(model)} for model in source.value["models"]],
        "source": str(source.path),
    }
