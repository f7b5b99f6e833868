"""Needle in a haystack: how many facts of a row are recalled at its end, by length of the row and depth of the fact."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from hylo.data.retrieval import FactFormat, NeedleRow, needle_row
from hylo.errors import HyloError
from hylo.evaluate.forward import Scorer, batches


@dataclass(frozen=True)
class NeedleScore:
    """`accuracy` over all `answers`, its `standard_error`, and accuracy `by_depth` from a row's start to its end."""

    accuracy: float
    standard_error: float
    by_depth: list[float]
    answers: int


def needle_rows(
    stream: np.ndarray, length: int, facts: FactFormat, answers: int, needles: int, seed: int
) -> list[NeedleRow]:
    """Rows with at least `answers` questions in all; each row has one needle in every depth bin. Alike for every model.

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


def recalled(scorer: Scorer, rows: list[NeedleRow]) -> np.ndarray:
    """Which answers the model gives: (rows, needles) bool, the needles of a row in order of depth.

    An answer counts when every token of its span is the most likely one given all the text before it, the right
    answers to earlier questions included: what greedy decoding from the end of the question gives.
    """
    right = np.zeros((len(rows), len(rows[0].spans)), bool)
    row = 0
    for ids in batches(torch.from_numpy(np.stack([r.ids for r in rows]))):
        hidden = scorer.hidden(ids)
        for i in range(len(ids)):
            spans = rows[row].spans
            at = torch.tensor([t for a, b in spans for t in range(a, b)])
            hit = scorer.logits(hidden[i, at - 1]).argmax(-1).cpu() == ids[i, at]
            answers = [part.all().item() for part in hit.split([b - a for a, b in spans])]
            right[row] = np.array(answers)[np.argsort(rows[row].depths)]
            row += 1
    return right


def needle_score(scorer: Scorer, rows: list[NeedleRow]) -> NeedleScore:
    """Accuracy over rows that have one needle in every depth bin.

    The standard error is that of the mean of row accuracies: answers in one row share a haystack, rows do not.
    """
    right = recalled(scorer, rows)
    error = right.mean(1).std(ddof=1) / math.sqrt(len(rows))
    return NeedleScore(float(right.mean()), float(error), right.mean(0).tolist(), right.size)
