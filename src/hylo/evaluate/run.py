"""Evaluates several models by several suites, and gathers what they say in one dictionary, as JSON keeps it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hylo.errors import HyloError
from hylo.evaluate.describe import describe
from hylo.evaluate.progress import Bar
from hylo.evaluate.served import Served
from hylo.evaluate.subject import Subject
from hylo.files import differences, read_json

FORMAT = "hylo-evaluation-1"
PACKAGES = ("hylo", "torch", "transformers", "lm_eval", "datasets")
USUAL_LENGTHS = (2048, 8192)
Result = dict[str, Any]
NotRun = dict[str, str]


@dataclass(frozen=True)
class Suite:
    """One suite and its settings, as JSON values; the same for every model.

    `check` raises HyloError for what cannot be, before a model is loaded; `run` gives a model's result, and what of
    the suite was not run, with the reason.
    """

    name: str
    settings: dict[str, Any]
    check: Callable[[Any], object]
    run: Callable[[Any, Bar], tuple[Result, NotRun]]


def evaluate_suites(
    subjects: Sequence[Subject | Served], suites: Sequence[Suite], known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Runs every suite on every model, one model in memory at a time, and adds to `known`, an earlier result.

    Returns {"format", "models": {name: describe(...)}, "suites": {suite: {"settings", "not_run": {what: reason},
    "results": {name: result}}}, "meta": {"versions", "seconds"}}. All that can be wrong is found first: HyloError.
    """
    described = {subject.name: describe(subject) for subject in subjects}
    result = known or {"format": FORMAT, "models": {}, "suites": {}, "meta": {}}
    _check_same(result, described, suites)
    for suite in suites:
        for subject in subjects:
            suite.check(subject)
    began = time.monotonic()
    with Bar() as bar:
        for subject in subjects:
            for suite in suites:
                part = result["suites"].setdefault(
                    suite.name, {"settings": suite.settings, "not_run": {}, "results": {}}
                )
                part["results"][subject.name], not_run = suite.run(subject, bar)
                part["not_run"] |= not_run
            subject.release()
    result["models"] |= described
    result["meta"] = {
        "versions": versions(),
        "seconds": round(time.monotonic() - began, 1),
    }
    return result


def read_results(path: Path) -> dict[str, Any]:
    """A results file. HyloError if it is none, and says so."""
    result = read_json(path, "results")
    if result.get("format") != FORMAT:
        raise HyloError(
            f"{path} holds no results of hylo evaluate (format {result.get('format')}); choose another file"
        )
    return result


def _check_same(known: Mapping[str, Any], described: Mapping[str, Any], suites: Sequence[Suite]) -> None:
    """That what is added to earlier results is of the same models and settings."""
    for name, model in described.items():
        if name in known["models"] and known["models"][name]["hash"] != model["hash"]:
            raise HyloError(
                f"the results hold another model called {name} ({known['models'][name]['directory']}, hash "
                f"{known['models'][name]['hash'][:8]}, not {model['hash'][:8]}); name it otherwise, as NAME=DIR, or "
                "write to another file"
            )
    for suite in suites:
        if suite.name in known["suites"]:
            unlike = differences(known["suites"][suite.name]["settings"], suite.settings)
            if unlike:
                said = "; ".join(unlike[:3])
                raise HyloError(f"the results hold {suite.name} with other settings ({said}); write to another file")


def versions() -> dict[str, str]:
    """Of what the figures depend on, where it is installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def subjects_of(
    models: Sequence[str], precision: str, tokenizer: Path | None = None, beyond: bool = False
) -> list[Subject | Served]:
    """Models of `DIR`, `http://ADDRESS`, or `NAME=` before one of them; directories of one name are told apart by the
    folders that they lie in. `tokenizer`: the directory that has a served model's. Raises HyloError for doubled names.
    """
    parts = [(name, target) for name, target in map(_named, models)]
    paths = [Path(target) for _, target in parts if not _is_address(target)]
    subjects: list[Subject | Served] = []
    for name, target in parts:
        if not _is_address(target):
            subjects.append(Subject(name or _short(Path(target), paths), Path(target), precision, beyond))
        elif tokenizer is None:
            raise HyloError(f"{target} is a served model; give the directory that has its tokenizer as --tokenizer DIR")
        else:
            subjects.append(Served(name or tokenizer.resolve().name, target, tokenizer))
    names = [subject.name for subject in subjects]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise HyloError(f"two models are called {doubled[0]}; name them, as NAME=DIR")
    return subjects


def _named(model: str) -> tuple[str, str]:
    name, mark, target = model.partition("=")
    return (name, target) if mark and not _is_address(model) else ("", model)


def _is_address(target: str) -> bool:
    return target.startswith(("http://", "https://"))


def _short(path: Path, paths: Sequence[Path]) -> str:
    """The end of a path that no other has: `extended-2048`, or `control/extended-2048` beside another of that name."""
    own = path.resolve().parts
    others = [other.resolve().parts for other in paths if other.resolve() != path.resolve()]
    n = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), 1)
    return "/".join(own[-n:])


def usual_lengths(subjects: Sequence[Subject | Served]) -> list[int]:
    """2048 and 8192 tokens as far as every model's context holds them, or else the shortest context."""
    shortest = min((subject.context for subject in subjects if subject.context is not None), default=USUAL_LENGTHS[-1])
    return [length for length in USUAL_LENGTHS if length <= shortest] or [shortest]
