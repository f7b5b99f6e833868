"""What a model is worth without any task: perplexity and KL by position, its mixers' errors, its cache's bytes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hylo.data.settings import STANDARD_LIBRARY
from hylo.errors import HyloError
from hylo.evaluate.forward import Scorer, Teacher
from hylo.evaluate.held_out import HeldOut, held_out
from hylo.evaluate.memory import measure_memory
from hylo.evaluate.mixer_error import has_mixers, mixer_distances, mixer_summary, no_correspondence
from hylo.evaluate.perplexity import row_sums, text_rows, text_summary
from hylo.evaluate.progress import Bar
from hylo.evaluate.records import records
from hylo.evaluate.rows import Done, Record, outcomes, per_row, record_rows, row_keys, tokens_left
from hylo.evaluate.subject import Subject

VERSION = 1  # of what a record says: another one, and rows are read again
MIXER_TOKENS = 8192  # of the shortest rows: enough for two digits of a layer's error

Rows = Mapping[int, Tensor]  # by length (R, T)
NotRun = dict[str, str]  # what -> why
Advance = Callable[[int], None]


@dataclass(frozen=True)
class IntrinsicSettings:
    """About `tokens` tokens of `text` (files, folders or python-stdlib) are read at every length."""

    lengths: tuple[int, ...]
    tokens: int = 32768
    seed: int = 0
    text: tuple[str, ...] = (STANDARD_LIBRARY,)

    def rows(self, text: HeldOut) -> Rows:
        """Raises HyloError if a length is below 2 or the text too short."""
        return plain_rows(text, self.lengths, self.tokens, self.seed)


def evaluate_intrinsic(
    subject: Subject, settings: IntrinsicSettings, teacher: Teacher | None, bar: Bar
) -> tuple[dict[str, Any], NotRun]:
    """Returns the result and what could not be measured. Goes on from the rows that are recorded.

    By length (a string): "perplexity", "perplexity_se", "kl", "kl_se" (KL(teacher || model) in nats a token; only with
    a teacher that is another model), "tokens", "by_position" (see TextScore), "row_loss" (each row's mean in nats, None
    where it failed: models that read the same rows are compared in pairs) and "memory" (see `measure_memory`).
    "mixer_error" (see `mixer_summary`) of a hybrid whose teacher has its base's shape. "seconds" and "text_hash".
    Raises HyloError as `check_intrinsic`.
    """
    text = held_out(subject, settings.text)
    rows = settings.rows(text)
    teacher = None if teacher is None or teacher.hash == subject.hash else teacher
    identity = intrinsic_identity(subject, text, settings.lengths, settings.seed, teacher)
    with records(subject.hash, "intrinsic", identity) as done:
        student = Scorer(subject)
        bar.begin(f"{subject.name}: intrinsic", tokens_left(row_sets(rows, student, teacher), done))
        result, not_run = measure_intrinsic(student, rows, teacher, done, bar.advance)
    result["text_hash"] = text.digest
    return result, {f"{what} of {subject.name}": why for what, why in not_run.items()}


def check_intrinsic(subject: Subject, settings: IntrinsicSettings, teacher: Subject | None = None) -> None:
    """Raises HyloError for lengths beyond a context, text that is too short, and a teacher of another vocabulary."""
    subject.check_context(list(settings.lengths), "intrinsic")
    settings.rows(held_out(subject, settings.text))
    if teacher is not None:
        teacher.check_context(list(settings.lengths), "intrinsic")
        check_vocabulary(Scorer(subject), Scorer(teacher))


def check_vocabulary(student: Scorer, teacher: Scorer) -> None:
    if teacher.vocabulary != student.vocabulary:
        raise HyloError(
            f"the teacher's vocabulary has {teacher.vocabulary} tokens and the model's {student.vocabulary}; "
            "choose a teacher of the same family"
        )


def plain_rows(text: HeldOut, lengths: tuple[int, ...], tokens: int, seed: int) -> Rows:
    if min(lengths) < 2:
        raise HyloError(f"a row of {min(lengths)} tokens has nothing to predict; ask for lengths of 2 or more")
    return text_rows(text.stream, lengths, tokens, seed)


def intrinsic_identity(
    subject: Subject, text: HeldOut, lengths: tuple[int, ...], seed: int, teacher: Teacher | None
) -> dict[str, Any]:
    """What fixes a row's record, beside its number; shorter rows are cut from those of the longest length."""
    named = None if teacher is None else teacher.hash
    return subject.identity() | {
        "version": VERSION,
        "text": text.digest,
        "longest": max(lengths),
        "seed": seed,
        "teacher": named,
    }


def measure_intrinsic(
    student: Scorer, rows: Rows, teacher: Teacher | None, done: Done, advance: Advance = lambda tokens: None
) -> tuple[dict[str, Any], NotRun]:
    """Reads what has no record and returns what `evaluate_intrinsic` does."""
    measured = Measured(student, teacher, done, advance)
    for length, of_length in rows.items():
        measured.text(length, of_length)
    measured.mixers(mixer_rows(rows))
    for length in rows:
        measured.memory(length)
    return measured.result | {"seconds": round(measured.seconds, 2)}, measured.not_run


class Measured:
    """A result as it grows."""

    def __init__(self, student: Scorer, teacher: Teacher | None, done: Done, advance: Advance) -> None:
        self.student, self.teacher, self.done, self.advance = student, teacher, done, advance
        self.result: dict[str, Any] = {"perplexity": {}, "perplexity_se": {}}
        self.result |= {} if teacher is None else {"kl": {}, "kl_se": {}}
        self.result |= {"tokens": {}, "by_position": {}, "row_loss": {}, "memory": {}}
        self.not_run: NotRun = {}
        self.seconds = 0.0

    def text(self, length: int, rows: Tensor) -> None:
        """Perplexity and KL."""
        keys = row_keys(length, len(rows))
        good = self._read(f"text at {length}", rows, keys, self._row_sums)
        if not good:
            return
        score, at = text_summary(good, length), str(length)
        values: dict[str, Any] = {
            "perplexity": score.perplexity.value,
            "perplexity_se": score.perplexity.error,
            "tokens": score.tokens,
            "by_position": score.by_position,
            "row_loss": per_row(keys, self.done, lambda record: sum(record["loss"]) / (length - 1)),
        }
        if score.kl is not None:
            values |= {"kl": score.kl.value, "kl_se": score.kl.error}
        for measure, value in values.items():
            self.result[measure][at] = value

    def mixers(self, rows: Tensor) -> None:
        if self.teacher is None or not has_mixers(self.student.config):
            return
        why = no_correspondence(self.student.config, self.teacher.config)
        if why is not None:
            self.not_run["mixer_error"] = why
            return
        if good := self._read("mixer_error", rows, mixer_keys(rows), self._mixer_distances):
            self.result["mixer_error"] = mixer_summary(good, self.student.config.mixers)

    def memory(self, length: int) -> None:
        def read(ids: Tensor, batch: list[int]) -> list[Record]:
            return [measure_memory(self.student.model, length)]

        good = self._read(f"memory at {length}", torch.zeros(1, length), [memory_key(length)], read)
        if good:
            self.result["memory"][str(length)] = {k: v for k, v in good[0].items() if k != "seconds"}

    def _row_sums(self, ids: Tensor, batch: list[int]) -> list[Record]:
        return row_sums(self.student, ids, self.teacher)

    def _mixer_distances(self, ids: Tensor, batch: list[int]) -> list[Record]:
        assert self.teacher is not None
        return mixer_distances(self.student.model, self.teacher.model, ids)

    def _read(
        self, what: str, rows: Tensor, keys: list[str], read: Callable[[Tensor, list[int]], list[Record]]
    ) -> list[Record]:
        record_rows(rows, keys, read, self.done, self.advance)
        good, errors = outcomes(keys, self.done)
        if errors:
            self.not_run[what] = f"{len(errors)} of {len(keys)} rows failed: {errors[0]}"
        self.seconds += sum(record["seconds"] for record in good)
        return good


def mixer_rows(rows: Rows) -> Tensor:
    """Of the shortest length, as alignment is short too: at most MIXER_TOKENS tokens, or two rows."""
    shortest = min(rows)
    return rows[shortest][: max(2, MIXER_TOKENS // shortest)]


def mixer_keys(rows: Tensor) -> list[str]:
    return row_keys(f"mixers/{rows.shape[1]}", len(rows))


def memory_key(length: int) -> str:
    return f"memory/{length}"


def row_sets(rows: Rows, student: Scorer, teacher: Teacher | None) -> list[tuple[int, list[str]]]:
    """(tokens a row, keys) of everything that is read, for `tokens_left`."""
    sets = [(length, row_keys(length, len(of_length))) for length, of_length in rows.items()]
    sets += [(length, [memory_key(length)]) for length in rows]
    if teacher is not None and has_mixers(student.config) and not no_correspondence(student.config, teacher.config):
        of_mixers = mixer_rows(rows)
        sets.append((of_mixers.shape[1], mixer_keys(of_mixers)))
    return sets
