"""Short context through lm-eval: seven commonsense tasks, GSM8K, and its `ruler` group, 0-shot as published.

lm-eval (EleutherAI's lm-evaluation-harness) owns prompts, scoring of choices, stop sequences, filters and metrics; here
are where data come from, batches, records and means.
"""

import contextlib
import hashlib
import io
import logging
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from transformers.utils import logging as transformers_logging

from hylo.errors import HyloError
from hylo.evaluate.harness_data import SOURCES, load_ruler_task, load_task, local_copy
from hylo.evaluate.progress import Bar
from hylo.evaluate.records import Records, records
from hylo.evaluate.served import Served
from hylo.evaluate.subject import Subject
from hylo.hub import offline_if_unreachable

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from hylo.evaluate.harness_answers import RecordedLM

VERSION = 1
COMMONSENSE = ("arc_challenge", "arc_easy", "hellaswag", "openbookqa", "piqa", "race", "winogrande")
SUITES = {"commonsense": COMMONSENSE, "gsm8k": ("gsm8k",)}
METRICS = dict.fromkeys(COMMONSENSE, "acc_norm") | {"race": "acc", "winogrande": "acc", "gsm8k": "exact_match"}
GSM8K_FILTER, GSM8K_TOKENS = "flexible-extract", 256
RULER = {  # its names in lm-eval -> the benchmark's
    **{name: name for name in (f"niah_{kind}_{n}" for kind in ("single", "multikey") for n in (1, 2, 3))},
    **{"niah_multivalue": "niah_multivalue", "niah_multiquery": "niah_multiquery"},
    **{f"ruler_{name}": name for name in ("vt", "cwe", "fwe")},
    **{"ruler_qa_squad": "qa_1", "ruler_qa_hotpot": "qa_2"},
}
RULER_SHORTEST = 2048  # lm-eval's makers of vt and qa look for a fit without end where there is none
Result = dict[str, Any]
NotRun = dict[str, str]


@dataclass(frozen=True)
class HarnessSettings:
    """`samples`: at most so many of each task (and length), the first ones; None all. `data`: local copies of the sets.

    `lengths`, in tokens, and `ruler_tasks`, by the benchmark's names, are of lm-eval's `ruler` group alone. `batch`:
    rows at once, "auto" as many as memory holds.
    """

    data: Path | None = None
    samples: int | None = None
    few_shot: int = 0
    chat: bool = False
    batch: int | str = "auto"
    lengths: tuple[int, ...] = ()
    ruler_tasks: tuple[str, ...] = tuple(RULER.values())


def check_harness(subject: Subject | Served, suite: str, settings: HarnessSettings) -> None:
    """Raises HyloError for what cannot be, before a model is loaded. `suite`: commonsense, gsm8k or ruler."""
    if not find_spec("lm_eval"):
        raise HyloError(f'{suite} needs lm-eval, which is not installed; run: pip install "hylo[eval]"')
    if settings.samples is not None and settings.samples < 1:
        raise HyloError(f"samples {settings.samples}: at least 1 is needed")
    if settings.few_shot < 0:
        raise HyloError(f"few-shot examples {settings.few_shot}: at least 0 are needed")
    if settings.batch != "auto" and (not str(settings.batch).isdigit() or int(settings.batch) < 1):
        raise HyloError(f"batch {settings.batch!r} is neither auto nor a number of rows of at least 1")
    if settings.chat and not subject.tokenizer.chat_template:
        raise HyloError(f"{subject.name} has no chat template; evaluate it without one")
    if suite == "ruler":
        _check_ruler(subject, settings)
        return
    if suite == "gsm8k" and subject.context is not None and subject.context <= GSM8K_TOKENS:
        raise HyloError(
            f"gsm8k generates up to {GSM8K_TOKENS} tokens, beyond the context of {subject.name}, {subject.context}; "
            "leave it out"
        )
    for task in SUITES[suite]:
        local_copy(task, settings.data, settings.few_shot)


def _check_ruler(subject: Subject | Served, settings: HarnessSettings) -> None:
    if missing := [name for name in ("nltk", "wonderwords") if not find_spec(name)]:
        raise HyloError(
            f'lm-eval\'s ruler needs {" and ".join(missing)}; run: pip install "lm-eval[ruler]", or evaluate without it'
        )
    if unknown := [task for task in settings.ruler_tasks if task not in RULER.values()]:
        raise HyloError(f"RULER has no task {unknown[0]}; choose among {', '.join(RULER.values())}")
    if not settings.lengths:
        raise HyloError("ruler needs lengths; give some, as 8192,16384")
    if min(settings.lengths) < RULER_SHORTEST:
        raise HyloError(
            f"lm-eval's ruler at {min(settings.lengths)} tokens may never find a sample that fits; ask for "
            f"{RULER_SHORTEST} or more, or evaluate without lm-eval"
        )
    subject.check_context(list(settings.lengths), "lm-eval's ruler")


def evaluate_harness(
    subject: Subject | Served, suite: str, settings: HarnessSettings, bar: Bar
) -> tuple[Result, NotRun]:
    """A suite's scores, 0 to 100, with standard errors, and the tasks whose data cannot be had, with the reason.

    commonsense, gsm8k: {"scores": {TASK: {"score", "se", "samples", "failed", "metric", "metrics"}}, "mean": {"score",
    "se", "tasks"} or None, "data": {TASK: {"source", "rows", "hash", "version"}}, "failures", "truncated", "lm_eval"};
    ruler: scores and means by length, {TASK: {"8192": {...}}} and {"8192": {...}}. `mean` is over the tasks that ran.
    """
    check_harness(subject, suite, settings)
    identity = {
        **subject.identity(),
        "version": VERSION,
        "lm_eval": version("lm_eval"),
        "context": subject.context,
        "suite": suite,
    }
    stderr = sys.stderr
    with _quiet():
        tasks, not_run = _tasks(subject, suite, settings)
        if not tasks:
            empty: Result = {
                "scores": {},
                "mean": {} if suite == "ruler" else None,
                "data": {},
                "lm_eval": version("lm_eval"),
            }
            return empty, not_run
        with records(subject.hash, f"{suite}-lm-eval", identity) as done:
            model = _model(subject, settings, done, bar, f"{subject.name}, {suite}", stderr)
            found = _evaluate(model, tasks, settings)
    result = (_ruler_scores if suite == "ruler" else _scores)(found, model)
    failures = {
        f"{RULER.get(task, task)}/{row['doc_id']}": reason
        for task, rows in found.items()
        for row in rows
        if (reason := _failed(row, task, model))
    }
    result["data"] = {RULER.get(name, name): _described(task, found[name], settings) for name, task in tasks.items()}
    result |= {"failures": failures, "truncated": len(model.truncated), "lm_eval": version("lm_eval")}
    return result, not_run


def _model(
    subject: Subject | Served, settings: HarnessSettings, done: Records, bar: Bar, name: str, stderr: TextIO
) -> "RecordedLM":
    """The model, loaded if it is not a served one, as lm-eval asks it."""
    from lm_eval.models.huggingface import HFLM

    from hylo.evaluate.harness_answers import MOST_ROWS, Batches, RecordedLM, token_budget
    from hylo.evaluate.harness_served import ServedLM

    if isinstance(subject, Served):
        batches = Batches(subject.tokenizer, subject.context, MOST_ROWS if settings.batch == "auto" else settings.batch)
        return RecordedLM(ServedLM(subject), batches, done, bar, name, stderr)
    rows = MOST_ROWS if settings.batch == "auto" else int(settings.batch)
    asked = HFLM(subject.model, tokenizer=subject.tokenizer, max_length=subject.context, batch_size=rows)
    batches = Batches(subject.tokenizer, subject.context, settings.batch, token_budget(subject.model))
    return RecordedLM(asked, batches, done, bar, name, stderr)


def _tasks(subject: Subject | Served, suite: str, settings: HarnessSettings) -> tuple[dict[str, "Task"], NotRun]:
    """lm-eval's tasks by its names, and why others cannot be had."""
    found: dict[str, Task] = {}
    not_run: NotRun = {}
    if suite == "ruler" or any(local_copy(name, settings.data, settings.few_shot) is None for name in SUITES[suite]):
        offline_if_unreachable()
    names = [name for name in RULER if RULER[name] in settings.ruler_tasks] if suite == "ruler" else SUITES[suite]
    for name in names:
        try:
            if suite == "ruler":
                found[name] = load_ruler_task(name, settings.lengths, subject.directory)
            else:
                found[name] = load_task(name, settings.data, settings.few_shot)
        except HyloError:
            raise
        except Exception as error:  # of any class: the hub's, a mirror's, the network's
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            source = f"{SOURCES[name].hub} has no local copy and" if name in SOURCES else "its data"
            not_run[RULER.get(name, name)] = f"{source} cannot be had ({reason})"
    return found, not_run


def _evaluate(
    model: "RecordedLM", tasks: dict[str, "Task"], settings: HarnessSettings
) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval says of every sample that did not fail, by task."""
    import lm_eval

    chosen: dict[str, Any] = {"limit": settings.samples}
    if settings.samples and settings.lengths:  # the samples of a length come after those of another
        chosen = {"samples": {name: _first(task, settings.samples) for name, task in tasks.items()}}
    found = lm_eval.evaluate(
        lm=model,
        task_dict={"tasks": tasks},
        bootstrap_iters=0,
        apply_chat_template=settings.chat,
        fewshot_as_multiturn=settings.chat,
        **chosen,
    )
    assert found is not None  # it is on other ranks of a run over several GPUs
    return {name: found["samples"][name] for name in tasks}


def _first(task: "Task", count: int) -> list[int]:
    """The numbers of the first samples of each length."""
    lengths = list(task.eval_docs["max_length"])
    return [
        i for length in dict.fromkeys(lengths) for i in [j for j, own in enumerate(lengths) if own == length][:count]
    ]


def _scores(found: Mapping[str, list[dict[str, Any]]], model: "RecordedLM") -> Result:
    scores = {}
    for task, rows in found.items():
        filters = dict.fromkeys(row["filter"] for row in rows)
        metrics = {}
        for name in dict.fromkeys(name for row in rows for name in row["metrics"]):
            for kind in filters:
                values = [float(row[name]) for row in rows if row["filter"] == kind and not _failed(row, task, model)]
                metrics[name if kind == "none" else f"{name}, {kind}"] = mean_and_error(values)
        chosen = f"{METRICS[task]}, {GSM8K_FILTER}" if task == "gsm8k" else METRICS[task]
        failed = len({row["doc_id"] for row in rows if _failed(row, task, model)})
        scores[task] = {**metrics[chosen], "failed": failed, "metric": chosen, "metrics": metrics}
    return {"scores": scores, "mean": mean_of_tasks(scores.values())}


def _ruler_scores(found: Mapping[str, list[dict[str, Any]]], model: "RecordedLM") -> Result:
    scores: dict[str, dict[str, Any]] = {}
    for task, rows in found.items():
        cells = scores[RULER[task]] = {}
        for length in sorted({row["doc"]["max_length"] for row in rows}):
            own = [row for row in rows if row["doc"]["max_length"] == length]
            kept = [float(row[str(length)]) for row in own if not _failed(row, task, model)]
            cells[str(length)] = {**mean_and_error(kept), "failed": len(own) - len(kept)}
    lengths = sorted({length for cells in scores.values() for length in cells}, key=int)
    means = {n: mean_of_tasks([cells[n] for cells in scores.values() if n in cells]) for n in lengths}
    return {"scores": scores, "mean": {n: mean for n, mean in means.items() if mean}}


def _failed(row: Mapping[str, Any], task: str, model: "RecordedLM") -> str | None:
    """Why one of a sample's requests failed."""
    from hylo.evaluate.harness_answers import key_of

    return next((model.failed[key] for asked in row["arguments"] if (key := key_of(task, asked)) in model.failed), None)


def mean_and_error(values: list[float]) -> dict[str, Any]:
    """Of shares from 0 to 1, as per cent: the mean, and the standard error sd / sqrt(n) with n - 1 (None of one)."""
    error = 100 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"score": 100 * statistics.fmean(values) if values else None, "se": error, "samples": len(values)}


def mean_of_tasks(cells: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The mean over tasks that have a score, and its standard error, sqrt(sum se^2) / n; None of no task."""
    known = [cell for cell in cells if cell["score"] is not None]
    if not known:
        return None
    errors = [cell["se"] for cell in known]
    error = None if None in errors else math.hypot(*errors) / len(known)
    return {"score": statistics.fmean(cell["score"] for cell in known), "se": error, "tasks": len(known)}


def _described(task: "Task", rows: list[dict[str, Any]], settings: HarnessSettings) -> dict[str, Any]:
    """Where a task's data came from, and a hash of those that were used."""
    name = str(task.config.task)
    digest = hashlib.sha256("".join(row["doc_hash"] for row in rows).encode()).hexdigest()
    found = {"rows": len({row["doc_id"] for row in rows}), "hash": digest}
    if name not in SOURCES:
        return {"source": "made by lm-eval", **found}
    local = local_copy(name, settings.data, settings.few_shot) is not None
    source = f"local copy in {settings.data}" if local else f"hub, {SOURCES[name].hub}"
    return {"source": source, **found, "version": task.VERSION}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps lm-eval's and transformers' lines off the terminal: what matters is in the result."""
    logger, level, verbosity = (
        logging.getLogger("lm_eval"),
        logging.getLogger("lm_eval").level,
        transformers_logging.get_verbosity(),
    )
    logger.setLevel(logging.CRITICAL)
    transformers_logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
