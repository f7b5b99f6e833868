"""The rows that layers are scored on, and what a model makes of them, row by row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hylo.data.mixture import FACT_SPACING, REPEATS
from hylo.data.retrieval import fact_row, window
from hylo.data.training import TrainingData
from hylo.errors import HyloError
from hylo.evaluate.forward import TILE_LOGITS, Scorer, Teacher
from hylo.evaluate.perplexity import Estimate, mean_of
from hylo.evaluate.rows import BATCH_TOKENS


@dataclass(frozen=True)
class Probe:
    """`ids_RT` int64; `answer_RT` marks values of restated facts, which the context determines; bool."""

    ids_RT: Tensor
    answer_RT: Tensor

    @property
    def tokens(self) -> int:
        return self.ids_RT.numel()


def probe_rows(data: TrainingData, length: int, tokens: int, facts: float, seed: Sequence[int]) -> Probe:
    """About `tokens` tokens of held-out text in rows of `length`, at least four of them; a share of `facts` of the rows
    has facts planted in it as training rows have.

    Raises HyloError where the held-out text is shorter than a row, or a row too short for a fact.
    """
    stream, count = data.held_out, max(4, tokens // length)
    if len(stream) < length:
        raise HyloError(f"the held-out text has {len(stream)} tokens, fewer than one row of {length}; give more text")
    if facts and length < 2 * REPEATS * data.facts.longest:
        least = 2 * REPEATS * data.facts.longest
        raise HyloError(f"rows of {length} tokens are too short for facts; give a length of at least {least}")
    planted = max(1, round(facts * count)) if facts else 0
    rng = np.random.default_rng(list(seed))
    ids, answers = np.empty((count, length), np.int64), np.zeros((count, length), bool)
    for i in range(count):
        if i < planted:
            row = fact_row(rng, stream, length, data.facts, max(1, length // (FACT_SPACING * REPEATS)), REPEATS)
            ids[i], answers[i] = row.ids, row.answer
        else:
            ids[i] = window(rng, stream, length)
    return Probe(torch.from_numpy(ids), torch.from_numpy(answers))


@torch.no_grad()
def measure(student: Scorer, probe: Probe, teacher: Teacher) -> dict[str, Any]:
    """Row by row, in nats a token: {"kl": KL(teacher || student), "answers": the loss on the answers, None in rows
    without}.

    Raises HyloError where the model's probabilities are not finite.
    """
    kl: list[float] = []
    answers: list[float | None] = []
    size = max(1, BATCH_TOKENS // probe.ids_RT.shape[1])
    for ids_BT, answer_BT in zip(probe.ids_RT.split(size), probe.answer_RT.split(size), strict=True):
        for row, ours_TD, theirs_TD, answer_T in zip(
            ids_BT, student.hidden(ids_BT), teacher.remembered(ids_BT), answer_BT, strict=True
        ):
            kl_T, loss_T = _by_token(student, teacher, ours_TD, theirs_TD, row)
            kl.append(float(kl_T.mean()))
            answers.append(float(loss_T[answer_T[1:]].mean()) if answer_T.any() else None)
    if not np.isfinite(kl).all():
        raise HyloError("a model's probabilities are not finite; convert or align its students again")
    return {"kl": kl, "answers": answers}


def _by_token(
    student: Scorer, teacher: Teacher, ours_TD: Tensor, theirs_TD: Tensor, ids_T: Tensor
) -> tuple[Tensor, Tensor]:
    """KL (T,) and the loss of the next token (T-1,), the logits in tiles."""
    tile = max(1, TILE_LOGITS // student.vocabulary)
    following, kl, loss = ids_T.roll(-1).to(student.device), [], []
    for ours, theirs, next_N in zip(ours_TD.split(tile), theirs_TD.split(tile), following.split(tile), strict=True):
        log_q, log_p = student.logits(ours).log_softmax(-1), teacher.logits(theirs).log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).double().cpu())
        loss.append(-log_q.gather(1, next_N[:, None])[:, 0].double().cpu())
    return torch.cat(kl), torch.cat(loss)[:-1]


def difference(ours: Sequence[float | None], theirs: Sequence[float | None] | None = None) -> Estimate:
    """Mean over the rows that have a value, less the other's on the same rows; its standard error, paired."""
    pairs = zip(ours, theirs or [0.0] * len(ours), strict=True)
    return mean_of(np.array([a - b for a, b in pairs if a is not None and b is not None]))
