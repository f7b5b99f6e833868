"""Needle and intrinsic of several models on the same rows, as a run of `hylo upcycle` keeps them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import PreTrainedModel

from hylo.data.retrieval import FactFormat
from hylo.evaluate import intrinsic, needle
from hylo.evaluate.forward import Scorer, Teacher
from hylo.evaluate.held_out import HeldOut
from hylo.evaluate.intrinsic import check_vocabulary, intrinsic_identity, measure_intrinsic, plain_rows
from hylo.evaluate.needle import NeedleSettings, measure_needle, needle_identity
from hylo.evaluate.progress import Bar
from hylo.evaluate.records import records
from hylo.evaluate.rows import Done, InMemory, tokens_left
from hylo.evaluate.subject import Subject
from hylo.evaluate.table import print_table


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
    def text(self) -> HeldOut:
        return HeldOut(self.stream, self.facts)

    @cached_property
    def needle_rows(self) -> needle.Rows:
        """Raises HyloError if a length or the text is too short."""
        settings = NeedleSettings(tuple(self.lengths), self.needles, self.answers, self.answers_per_bin, self.seed)
        return settings.rows(self.text)

    @cached_property
    def text_rows(self) -> intrinsic.Rows:
        """Raises HyloError if a length or the text is too short."""
        return plain_rows(self.text, tuple(self.lengths), self.tokens, self.seed)

    @property
    def tokens_read(self) -> int:
        """Tokens that every model reads: all rows, and one a length to fill a cache; comparing mixers takes more."""
        rows = sum(len(rows) * length for length, rows in self.needle_rows.items())
        return rows + sum(rows.numel() for rows in self.text_rows.values()) + sum(self.lengths)


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

    Returns what `evaluate_needle` and `evaluate_intrinsic` do, and "meta"; "not_run" says what could not be measured.
    Raises HyloError if a directory is unusable, the vocabularies differ, or the text or a length is too short.
    """
    work = Workload(lengths, stream, facts, answers, tokens, needles, answers_per_bin, seed)
    return next(evaluate_models({model.name: model}, teacher, work, precision))[1]


def evaluate_models(
    models: Mapping[str, Path], teacher: Path | None, work: Workload, precision: str = "float32"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Evaluates several directories, giving each result as it comes; rows that are recorded are not read again.

    The teacher reads each row once for all models; its own directory among them gets no "kl". Shows progress on
    standard error.
    """
    subjects = {name: Subject(name, directory, precision) for name, directory in models.items()}
    _ = work.tokens_read  # before any model is loaded, so that bad lengths are found at once
    guide = None if teacher is None else Teacher(Subject("teacher", teacher, precision))
    with Bar() as bar:
        for name, subject in subjects.items():
            result = _recorded(subject, guide, work, bar)
            subject.release()
            yield name, result


def _recorded(subject: Subject, guide: Teacher | None, work: Workload, bar: Bar) -> dict[str, Any]:
    student, teacher = Scorer(subject), guide
    if guide is not None and guide.hash == subject.hash:
        student, teacher = guide, None
    needle_key = needle_identity(subject, work.text, work.needles, work.seed)
    intrinsic_key = intrinsic_identity(subject, work.text, tuple(work.lengths), work.seed, teacher)
    with (
        records(subject.hash, "needle", needle_key) as needles,
        records(subject.hash, "intrinsic", intrinsic_key) as intrinsics,
    ):
        left = tokens_left(needle.row_sets(work.needle_rows), needles)
        left += tokens_left(intrinsic.row_sets(work.text_rows, student, teacher), intrinsics)
        bar.begin(f"evaluate {subject.name}", left)
        return _measure(student, teacher, work, needles, intrinsics, bar.advance)


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
    return _measure(student, teacher, work, InMemory(), InMemory(), advance)


def _measure(
    student: Scorer,
    teacher: Teacher | None,
    work: Workload,
    needles: Done,
    intrinsics: Done,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    if teacher is not None:
        check_vocabulary(student, teacher)
    recall = measure_needle(student, work.needle_rows, needles, advance)
    worth, not_run = measure_intrinsic(student, work.text_rows, teacher, intrinsics, advance)
    seconds = recall.pop("seconds") + worth.pop("seconds")
    meta = {
        "seed": work.seed,
        "needles_per_row": work.needles,
        "precision": str(student.dtype).removeprefix("torch."),
        "device": student.device.type,
        "supported_length": student.config.max_position_embeddings,
        "seconds": round(seconds, 2),
        "versions": {package: version(package) for package in ("hylo", "torch", "transformers")},
    }
    return recall | worth | ({"not_run": not_run} if not_run else {}) | {"meta": meta}


def print_results(results: Mapping[str, dict[str, Any]], console: Console | None = None) -> None:
    """Prints a table: per metric one line a model, one column a length."""
    part = {"settings": {}, "not_run": {}, "results": results}
    print_table({"suites": {"needle": part, "intrinsic": part}}, console or Console())
