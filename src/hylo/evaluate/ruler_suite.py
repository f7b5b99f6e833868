"""RULER on a model: every task at every length, samples answered once and kept, means with standard errors."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from hylo.errors import HyloError
from hylo.evaluate.generation import Generator, GreedyGenerator, Prompt
from hylo.evaluate.progress import Bar
from hylo.evaluate.records import Records, records
from hylo.evaluate.ruler import TASKS, Sample, Sources, Task, check_tasks, ruler_samples, samples, score
from hylo.evaluate.ruler.encoding import Encoder
from hylo.evaluate.ruler.vocabulary import words_fingerprint
from hylo.evaluate.served import Served, ServedGenerator
from hylo.evaluate.subject import Subject

VERSION = 1  # of how answers are made and scored: those of another version are not gone on from


@dataclass(frozen=True)
class RulerSettings:
    """`samples` a task and length; the first ones are the same however many there are. `chat`: prompts are turns of the
    tokenizer's chat template."""

    lengths: Sequence[int]
    tasks: Sequence[str] = tuple(TASKS)
    samples: int = 100
    seed: int = 0
    sources: Sources = field(default_factory=Sources)
    chat: bool = False


def check_ruler(subject: Subject | Served, settings: RulerSettings) -> tuple[list[Task], dict[str, str]]:
    """The tasks that can be run, and why the others cannot. HyloError for settings that do not fit the model."""
    if settings.samples < 1:
        raise HyloError(f"RULER with {settings.samples} samples asks nothing; ask for one at least")
    subject.check_context(list(settings.lengths), "RULER")
    return check_tasks(
        settings.tasks,
        settings.lengths,
        subject.tokenizer,
        settings.sources,
        settings.seed,
        settings.samples,
        settings.chat,
    )


def evaluate_ruler(
    subject: Subject | Served, settings: RulerSettings, bar: Bar, generator: Generator | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Scores in per cent, {"scores": {task: {length: {"score", "se", "samples", "failed"}}}, "mean": {length: {"score",
    "se", "tasks"}}}, and why tasks were not run.

    A sample that fails is kept as such, left out of the mean, and tried again by the next evaluation. A score without
    answers, and a standard error of fewer than two, are None. Raises HyloError as `check_ruler` does.
    """
    tasks, not_run = check_ruler(subject, settings)
    with ExitStack() as stack:
        done = {
            task.name: stack.enter_context(records(subject.hash, "ruler", _identity(subject, settings, task)))
            for task in tasks
        }
        missing = {
            (task, length): [i for i in range(settings.samples) if not _answered(done[task.name], _key(length, i))]
            for length in sorted(settings.lengths)
            for task in tasks
        }
        bar.begin(f"{subject.name}: ruler", sum(length * len(numbers) for (_, length), numbers in missing.items()))
        for (task, length), numbers in missing.items():
            if numbers:
                generator = generator or generator_of(subject)
                _answer(subject, settings, task, length, numbers, generator, done[task.name], bar)
        return _result(tasks, settings, done), not_run


def generator_of(subject: Subject | Served) -> Generator:
    """Loads the model, where it is not one that is served."""
    if isinstance(subject, Served):
        return ServedGenerator(subject)
    return GreedyGenerator(subject.model, subject.tokenizer)


def _answer(
    subject: Subject | Served,
    settings: RulerSettings,
    task: Task,
    length: int,
    numbers: Sequence[int],
    generator: Generator,
    done: Records,
    bar: Bar,
) -> None:
    made: dict[int, Sample] = {
        sample.index: sample
        for sample in ruler_samples(
            task, length, settings.samples, subject.tokenizer, settings.seed, settings.sources, settings.chat
        )
    }
    asked = [made[i] for i in numbers]
    encoder = Encoder(subject.tokenizer)
    prompts = [Prompt(encoder.ids(sample.prompt), sample.tokens_to_generate) for sample in asked]
    for i, answer in generator.generate(prompts):
        sample = asked[i]
        record: dict[str, Any] = {"outputs": sample.outputs}
        if isinstance(answer, Exception):
            record["error"] = " ".join(f"{type(answer).__name__}: {answer}".split())
        else:
            record |= {"prediction": answer, "score": score(task, answer, sample.outputs)}
        done.add(_key(length, sample.index), record)
        bar.advance(length)


def _identity(subject: Subject | Served, settings: RulerSettings, task: Task) -> dict[str, Any]:
    """All that fixes an answer but the length and the sample's number."""
    return {
        "version": [VERSION, samples.VERSION],
        "task": task.name,
        "subject": subject.identity(),
        "seed": settings.seed,
        "tokenizer": Encoder(subject.tokenizer).fingerprint(),
        "chat": subject.tokenizer.chat_template if settings.chat else None,
        "words": words_fingerprint(),
        "sources": settings.sources.fingerprint(task.source),
    }


def _key(length: int, index: int) -> str:
    return f"{length}/{index}"


def _answered(done: Records, key: str) -> bool:
    return key in done and "error" not in done[key]


def _result(tasks: Sequence[Task], settings: RulerSettings, done: Mapping[str, Records]) -> dict[str, Any]:
    scores: dict[str, dict[str, Any]] = {}
    for task in tasks:
        scores[task.name] = {}
        for length in settings.lengths:
            found = [done[task.name][_key(length, i)] for i in range(settings.samples)]
            points = [record["score"] for record in found if "error" not in record]
            scores[task.name][str(length)] = {
                "score": mean(points) if points else None,
                "se": stdev(points) / math.sqrt(len(points)) if len(points) > 1 else None,
                "samples": len(points),
                "failed": len(found) - len(points),
            }
    return {"scores": scores, "mean": {str(n): _mean([scores[t][str(n)] for t in scores]) for n in settings.lengths}}


def _mean(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over tasks that have a score."""
    scored = [cell for cell in cells if cell["score"] is not None]
    errors = [cell["se"] for cell in scored]
    known = bool(scored) and None not in errors
    return {
        "score": mean(cell["score"] for cell in scored) if scored else None,
        "se": math.sqrt(sum(error**2 for error in errors)) / len(scored) if known else None,
        "tasks": len(scored),
    }
