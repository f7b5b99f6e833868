"""Needle in a haystack: how many facts of a row are recalled at its end, by length of the row and depth of the fact."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hylo.data.retrieval import FactFormat, NeedleRow, needle_row
from hylo.data.settings import STANDARD_LIBRARY
from hylo.errors import HyloError
from hylo.evaluate.forward import Scorer
from hylo.evaluate.held_out import HeldOut, held_out
from hylo.evaluate.progress import Bar
from hylo.evaluate.records import records
from hylo.evaluate.rows import Done, InMemory, Record, outcomes, per_row, record_rows, row_keys, tokens_left
from hylo.evaluate.subject import Subject

VERSION = 1  # of what a record says: another one, and rows are read again
Rows = Mapping[int, list[NeedleRow]]  # by length


@dataclass(frozen=True)
class NeedleSettings:
    """A map of `lengths` (tokens a row) by `depths` (equal parts of a row).

    `answers` are asked at every length, or in every cell of the map with `answers_per_cell`; each row has a fact at
    every depth. `text` is what facts are hidden in: files, folders or python-stdlib.
    """

    lengths: tuple[int, ...]
    depths: int = 8
    answers: int = 256
    answers_per_cell: bool = False
    seed: int = 0
    text: tuple[str, ...] = (STANDARD_LIBRARY,)

    def rows(self, text: HeldOut) -> Rows:
        """Raises HyloError if a length or the text is too short."""
        asked = self.answers * (self.depths if self.answers_per_cell else 1)
        return {n: needle_rows(text.stream, n, text.facts, asked, self.depths, self.seed) for n in self.lengths}


def evaluate_needle(subject: Subject, settings: NeedleSettings, bar: Bar) -> dict[str, Any]:
    """Returns, by length (a string), "needle" (the share of answers that are right, 0 to 1), "needle_se",
    "needle_depth" (a list), "needle_depth_se", "needle_answers" and "needle_rows" (each row's share, None where it
    failed: models that read the same rows are compared in pairs); "seconds" and "text_hash". Where rows failed, also
    "failed" and "errors" by length.

    Goes on from the rows that are recorded. Raises HyloError as `check_needle`.
    """
    text = held_out(subject, settings.text)
    rows = settings.rows(text)
    with records(subject.hash, "needle", needle_identity(subject, text, settings.depths, settings.seed)) as done:
        bar.begin(f"{subject.name}: needle", tokens_left(row_sets(rows), done))
        return measure_needle(Scorer(subject), rows, done, bar.advance) | {"text_hash": text.digest}


def check_needle(subject: Subject, settings: NeedleSettings) -> None:
    """Raises HyloError for lengths beyond the model's context, and for facts or text that do not fill a row."""
    subject.check_context(list(settings.lengths), "needle")
    settings.rows(held_out(subject, settings.text))


def needle_identity(subject: Subject, text: HeldOut, depths: int, seed: int) -> dict[str, Any]:
    """What fixes the answer to a row, beside its number."""
    return subject.identity() | {"version": VERSION, "text": text.digest, "depths": depths, "seed": seed}


def measure_needle(
    scorer: Scorer, rows: Rows, done: Done, advance: Callable[[int], None] = lambda tokens: None
) -> dict[str, Any]:
    """Reads the rows that have no record and returns what `evaluate_needle` does."""
    measures = ("needle", "needle_se", "needle_depth", "needle_depth_se", "needle_answers", "needle_rows")
    result: dict[str, Any] = {measure: {} for measure in measures}
    problems: dict[str, list[str]] = {}
    seconds = 0.0
    for length, of_length in rows.items():
        keys = row_keys(length, len(of_length))
        good, errors = _recorded(scorer, of_length, keys, done, advance)
        if errors:
            problems[str(length)] = errors
        if not good:
            continue
        score = needle_summary(np.array([record["right"] for record in good], bool))
        shares = per_row(keys, done, lambda record: float(np.mean(record["right"])))
        values = (score.accuracy, score.standard_error, score.by_depth, score.by_depth_error, score.answers, shares)
        for measure, value in zip(measures, values, strict=True):
            result[measure][str(length)] = value
        seconds += sum(record["seconds"] for record in good)
    if problems:
        result["failed"] = {length: len(errors) for length, errors in problems.items()}
        result["errors"] = {length: errors[0] for length, errors in problems.items()}
    return result | {"seconds": round(seconds, 2)}


def _recorded(
    scorer: Scorer, rows: Sequence[NeedleRow], keys: list[str], done: Done, advance: Callable[[int], None]
) -> tuple[list[Record], list[str]]:
    ids = torch.from_numpy(np.stack([row.ids for row in rows]))

    def read(ids_BT: torch.Tensor, batch: list[int]) -> list[Record]:
        found = answered(scorer, ids_BT, [rows[row] for row in batch])
        return [{"right": [int(answer) for answer in right]} for right in found]

    record_rows(ids, keys, read, done, advance)
    return outcomes(keys, done)


def row_sets(rows: Rows) -> list[tuple[int, list[str]]]:
    return [(length, row_keys(length, len(of_length))) for length, of_length in rows.items()]


def needle_rows(
    stream: np.ndarray, length: int, facts: FactFormat, answers: int, needles: int, seed: int
) -> list[NeedleRow]:
    """Rows with at least `answers` questions in all; each row has one needle in every depth bin. Alike for every model,
    and the first of more.

    Raises HyloError if the row or the text is too short.
    """
    taken = 2 * needles * facts.longest  # the facts, and the questions with their answers
    if needles > len(facts.keys):
        raise HyloError(f"{needles} needles a row are more than the {len(facts.keys)} different keys; ask for fewer")
    if taken + needles > length:
        raise HyloError(f"{needles} needles need {taken} of a row's {length} tokens; ask for fewer or for longer rows")
    if len(stream) < length:
        raise HyloError(f"the held-out text has {len(stream)} tokens, fewer than one row of {length}; give more text")
    rows = max(2, math.ceil(answers / needles))  # two, so that there is a standard error
    rng = np.random.default_rng((seed, length))
    return [needle_row(rng, stream, length, facts, needles, first_bin=i) for i in range(rows)]


@dataclass(frozen=True)
class NeedleScore:
    """`accuracy` over all `answers`, its `standard_error`, and the same of every depth, from a row's start to its end.

    The standard errors are those of a mean over rows, as answers in one row share a haystack; a single row has none.
    """

    accuracy: float
    standard_error: float | None
    by_depth: list[float]
    by_depth_error: list[float | None]
    answers: int


def needle_score(scorer: Scorer, rows: Sequence[NeedleRow]) -> NeedleScore:
    """Of rows that have one needle in every depth bin. Raises RuntimeError if a row cannot be read."""
    return needle_summary(recalled(scorer, rows))


def needle_summary(right: np.ndarray) -> NeedleScore:
    """`right` is (rows, depths) bool."""
    n = len(right)

    def errors(values: np.ndarray) -> list[Any]:
        found = values.std(axis=0, ddof=1) / math.sqrt(n) if n > 1 else np.full(values.shape[1:], None)
        return found.tolist()

    return NeedleScore(
        float(right.mean()), errors(right.mean(1, keepdims=True))[0], right.mean(0).tolist(), errors(right), right.size
    )


def recalled(scorer: Scorer, rows: Sequence[NeedleRow]) -> np.ndarray:
    """Which answers the model gives: (rows, needles) bool, the needles of a row in order of depth."""
    good, errors = _recorded(scorer, rows, row_keys("row", len(rows)), InMemory(), lambda tokens: None)
    if errors:
        raise RuntimeError(errors[0])
    return np.array([record["right"] for record in good], bool)


def answered(scorer: Scorer, ids_BT: torch.Tensor, rows: Sequence[NeedleRow]) -> np.ndarray:
    """`recalled` of one batch.

    An answer counts when every token of its span is the most likely one given all the text before it, the right
    answers to earlier questions included: what greedy decoding from the end of the question gives.
    """
    right = np.zeros((len(rows), len(rows[0].spans)), bool)
    hidden = scorer.hidden(ids_BT)
    for i, row in enumerate(rows):
        at = torch.tensor([t for a, b in row.spans for t in range(a, b)])
        logits = scorer.logits(hidden[i, at - 1])
        if not logits.isfinite().all():
            raise ValueError("the model's logits are not finite")
        hit = logits.argmax(-1).cpu() == ids_BT[i, at]
        answers = [part.all().item() for part in hit.split([b - a for a, b in row.spans])]
        right[i] = np.array(answers)[np.argsort(row.depths)]
    return right
