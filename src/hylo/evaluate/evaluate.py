"""Evaluates model directories on the same rows: one result per model, as JSON keeps it."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from hylo.data.retrieval import FactFormat, NeedleRow
from hylo.errors import HyloError
from hylo.evaluate.forward import Scorer, Teacher
from hylo.evaluate.needle import needle_rows, needle_score
from hylo.evaluate.perplexity import text_rows, text_score
from hylo.modeling.loading import load_model

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Workload:
    """What models are evaluated on; two models given the same workload see the same rows.

    `stream` is held-out text as token ids; `answers` are asked a length, or in every depth bin with `answers_per_bin`;
    a row has `needles` of them, each in its own depth bin; about `tokens` tokens a length measure perplexity and KL.
    """

    lengths: list[int]
    stream: np.ndarray
    facts: FactFormat
    answers: int = 256
    tokens: int = 32768
    needles: int = 8
    answers_per_bin: bool = False
    seed: int = 0

    @cached_property
    def rows(self) -> dict[int, tuple[list[NeedleRow], torch.Tensor]]:
        """By length, the rows with needles and the rows of plain text (R, T). HyloError if a length does not fit."""
        answers = self.answers * (self.needles if self.answers_per_bin else 1)
        texts = text_rows(self.stream, self.lengths, self.tokens, self.seed)
        return {
            n: (needle_rows(self.stream, n, self.facts, answers, self.needles, self.seed), texts[n])
            for n in self.lengths
        }

    @property
    def tokens_read(self) -> int:
        """Tokens that one model reads."""
        return sum(len(needle) * length + text.numel() for length, (needle, text) in self.rows.items())


def evaluate(
    model: Path,
    teacher: Path | None,
    lengths: list[int],
    stream: np.ndarray,
    facts: FactFormat,
    answers: int = 256,
    tokens: int = 32768,
    needles: int = 8,
    answers_per_bin: bool = False,
    seed: int = 0,
    precision: str = "float32",
) -> dict[str, Any]:
    """Evaluates one model directory; the arguments are those of `Workload`, `precision` is "float32" or "bf16".

    Returns {"needle", "needle_se", "needle_depth", "needle_answers", "kl", "perplexity", "tokens"}, each a dict from
    length (a string, as in JSON) to a value, and "meta". "kl", KL(teacher || model) in nats a token, needs a teacher.
    Raises HyloError if a directory is unusable, the vocabularies differ, or the text or a length is too short.
    """
    work = Workload(lengths, stream, facts, answers, tokens, needles, answers_per_bin, seed)
    return next(evaluate_models({model.name: model}, teacher, work, precision))[1]


def evaluate_models(
    models: Mapping[str, Path], teacher: Path | None, work: Workload, precision: str = "float32"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Evaluates several directories, giving each result as it comes; the teacher reads each row once for all of them.

    The teacher's own directory among the models gets no "kl". Shows progress on standard error.
    """
    if precision not in PRECISIONS:
        raise HyloError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load(directory: Path) -> PreTrainedModel:
        return load_model(directory, PRECISIONS[precision], device)

    total = work.tokens_read * len(models)  # before any model is loaded, so that bad lengths are found at once
    guide = None if teacher is None else Teacher(load(teacher))
    with _progress() as progress:
        task = progress.add_task("", total=total)
        for name, directory in models.items():
            progress.update(task, description=name)
            is_teacher = teacher is not None and directory.resolve() == teacher.resolve()
            model = guide.model if is_teacher and guide else load(directory)
            yield (
                name,
                evaluate_model(
                    model, None if is_teacher else guide, work, lambda tokens: progress.advance(task, tokens)
                ),
            )


def evaluate_model(
    model: PreTrainedModel,
    teacher: PreTrainedModel | Teacher | None,
    work: Workload,
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Any]:
    """Evaluates a model in memory; `advance` is called with the number of tokens read. Otherwise as `evaluate`."""
    student = Scorer(model)
    if isinstance(teacher, PreTrainedModel):
        teacher = Teacher(teacher)
    if teacher is not None and teacher.vocabulary != student.vocabulary:
        raise HyloError(
            f"the teacher's vocabulary has {teacher.vocabulary} tokens and the model's {student.vocabulary}; "
            "choose a teacher of the same family"
        )
    began = time.perf_counter()
    result: dict[str, Any] = {
        key: {} for key in ("needle", "needle_se", "needle_depth", "needle_answers", "kl", "perplexity", "tokens")
    }
    for length, (haystacks, texts) in work.rows.items():
        needle = needle_score(student, haystacks)
        advance(len(haystacks) * length)
        text = text_score(student, texts, teacher)
        advance(text.tokens)
        key = str(length)
        result["needle"][key] = needle.accuracy
        result["needle_se"][key] = needle.standard_error
        result["needle_depth"][key] = needle.by_depth
        result["needle_answers"][key] = needle.answers
        result["perplexity"][key] = text.perplexity
        result["tokens"][key] = text.tokens
        if text.kl is not None:
            result["kl"][key] = text.kl
    if teacher is None:
        del result["kl"]
    result["meta"] = {
        "seed": work.seed,
        "needles_per_row": work.needles,
        "precision": str(model.dtype).removeprefix("torch."),
        "device": student.device.type,
        "supported_length": model.config.max_position_embeddings,
        "seconds": round(time.perf_counter() - began, 2),
        "versions": {package: version(package) for package in ("hylo", "torch", "transformers")},
    }
    return result


def print_results(results: Mapping[str, dict[str, Any]], console: Console | None = None) -> None:
    """Prints a table: per metric one line a model, one column a length."""
    lengths = sorted({int(length) for result in results.values() for length in result["perplexity"]})
    table = Table("", *[f"{length:,}" for length in lengths])
    for column in table.columns[1:]:
        column.justify = "right"
    for title, key, show in (
        ("needle accuracy, % (standard error)", "needle", lambda x: f"{100 * x:.1f}"),
        ("KL to the teacher, nats/token", "kl", lambda x: f"{x:.4f}"),
        ("perplexity", "perplexity", lambda x: f"{x:.2f}"),
    ):
        if not any(result.get(key) for result in results.values()):
            continue
        table.add_row(f"[bold]{title}[/]")
        for name, result in results.items():
            cells = []
            for length in map(str, lengths):
                value = result.get(key, {}).get(length)
                error = result.get("needle_se", {}).get(length) if key == "needle" else None
                cells.append("" if value is None else show(value) + (f" ({100 * error:.1f})" if error else ""))
            table.add_row("  " + name, *cells)
        table.add_section()
    (console or Console()).print(table)


class _Throughput(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} tokens/s")


def _progress() -> Progress:
    """A bar with throughput and time left on standard error, nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("evaluate {task.description}"), BarColumn(), _Throughput(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
