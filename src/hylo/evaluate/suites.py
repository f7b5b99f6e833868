"""The suites by name: what each is told, what it refuses, and how it is run on a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hylo.data.settings import STANDARD_LIBRARY
from hylo.errors import HyloError
from hylo.evaluate.forward import Teacher
from hylo.evaluate.harness import HarnessSettings, check_harness, evaluate_harness
from hylo.evaluate.intrinsic import IntrinsicSettings, check_intrinsic, evaluate_intrinsic
from hylo.evaluate.needle import NeedleSettings, check_needle, evaluate_needle
from hylo.evaluate.progress import Bar
from hylo.evaluate.ruler import TASKS, Sources
from hylo.evaluate.ruler_suite import RulerSettings, check_ruler, evaluate_ruler
from hylo.evaluate.run import NotRun, Result, Suite
from hylo.evaluate.served import Served
from hylo.evaluate.subject import Subject

SUITES = ("ruler", "needle", "commonsense", "gsm8k", "intrinsic")
READ_INSIDE = ("needle", "intrinsic")  # these need more of a model than what it writes
THROUGH = "lm-eval"


@dataclass(frozen=True)
class Request:
    """What an evaluation is asked for: lengths in tokens, and each suite's own settings under their own names."""

    lengths: tuple[int, ...]
    seed: int = 0
    text: tuple[str, ...] = (STANDARD_LIBRARY,)
    teacher: Subject | None = None
    tokens: int = 32768
    answers: int = 256
    answers_per_cell: bool = False
    depths: int = 8
    samples: int = 100
    tasks: tuple[str, ...] = tuple(TASKS)
    sources: Sources = field(default_factory=Sources)
    chat: bool = False
    through: str | None = None
    data: Path | None = None
    limit: int | None = None


def suites_of(names: Sequence[str], request: Request) -> list[Suite]:
    """The suites asked for, in the order of `SUITES`. Raises HyloError for an unknown one."""
    if unknown := [name for name in names if name not in SUITES]:
        raise HyloError(f"--suite {','.join(names)}: there is no suite {unknown[0]!r}; choose from {', '.join(SUITES)}")
    if request.through not in (None, THROUGH):
        raise HyloError(f"--through {request.through}: RULER is run by hylo itself or through {THROUGH}")
    makers: dict[str, Callable[[Request], Suite]] = {
        "ruler": _ruler_through_lm_eval if request.through else _ruler,
        "needle": _needle,
        "commonsense": partial(_harness, "commonsense"),
        "gsm8k": partial(_harness, "gsm8k"),
        "intrinsic": _intrinsic,
    }
    return [makers[name](request) for name in SUITES if name in names]


def _ruler(request: Request) -> Suite:
    settings = RulerSettings(
        request.lengths, request.tasks, request.samples, request.seed, request.sources, request.chat
    )
    said = {
        "lengths": list(request.lengths),
        "tasks": list(request.tasks),
        "samples": request.samples,
        "seed": request.seed,
        "chat": request.chat,
        "haystack": request.sources.haystack_name,
        "sources": _digests(request),
        "through": "hylo",
    }
    return Suite("ruler", said, lambda s: check_ruler(s, settings), lambda s, bar: evaluate_ruler(s, settings, bar))


def _digests(request: Request) -> dict[str, str]:
    """Hashes of the essays and questions that are read."""
    found: dict[str, str] = {}
    for source in {TASKS[name].source for name in request.tasks if name in TASKS} - {None}:
        if source and request.sources.missing(source) is None:
            found |= request.sources.fingerprint(source)
    return dict(sorted(found.items()))


def _ruler_through_lm_eval(request: Request) -> Suite:
    settings = HarnessSettings(
        request.data, request.samples, chat=request.chat, lengths=request.lengths, ruler_tasks=request.tasks
    )
    said = {
        "lengths": list(request.lengths),
        "tasks": list(request.tasks),
        "samples": request.samples,
        "chat": request.chat,
        "haystack": "essays",
        "through": THROUGH,
    }
    return _through("ruler", said, settings)


def _harness(name: str, request: Request) -> Suite:
    settings = HarnessSettings(request.data, request.limit, chat=request.chat)
    return _through(name, {"limit": request.limit, "few_shot": settings.few_shot, "chat": request.chat}, settings)


def _through(name: str, said: dict[str, Any], settings: HarnessSettings) -> Suite:
    return Suite(
        name,
        said,
        lambda subject: check_harness(subject, name, settings),
        lambda subject, bar: evaluate_harness(subject, name, settings, bar),
    )


def _needle(request: Request) -> Suite:
    settings = NeedleSettings(
        request.lengths, request.depths, request.answers, request.answers_per_cell, request.seed, request.text
    )
    said = {
        "lengths": list(request.lengths),
        "depths": request.depths,
        "answers": request.answers,
        "answers_per_cell": request.answers_per_cell,
        "seed": request.seed,
        "text": list(request.text),
    }

    def run(subject: Subject, bar: Bar) -> tuple[Result, NotRun]:
        return evaluate_needle(subject, settings, bar), {}

    return Suite("needle", said, _inside("needle", lambda subject: check_needle(subject, settings)), run)


def _intrinsic(request: Request) -> Suite:
    settings = IntrinsicSettings(request.lengths, request.tokens, request.seed, request.text)
    said = {
        "lengths": list(request.lengths),
        "tokens": request.tokens,
        "seed": request.seed,
        "text": list(request.text),
        "teacher": request.teacher and request.teacher.hash,
    }
    teacher = None if request.teacher is None else Teacher(request.teacher)

    def run(subject: Subject, bar: Bar) -> tuple[Result, NotRun]:
        return evaluate_intrinsic(subject, settings, teacher, bar)

    check = _inside("intrinsic", lambda subject: check_intrinsic(subject, settings, request.teacher))
    return Suite("intrinsic", said, check, run)


def _inside(name: str, check: Callable[[Subject], object]) -> Callable[[Subject], object]:
    def both(subject: Subject) -> object:
        if isinstance(subject, Served):
            others = ",".join(suite for suite in SUITES if suite not in READ_INSIDE)
            raise HyloError(f"{name} reads a model's insides, which a served one hides; ask --suite {others} of it")
        return check(subject)

    return both
