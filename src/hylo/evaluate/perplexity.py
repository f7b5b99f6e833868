"""Perplexity on held-out text, and the divergence from a teacher, on the same rows and at every position."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hylo.errors import HyloError
from hylo.evaluate.forward import TILE_LOGITS, Scorer, Teacher
from hylo.evaluate.rows import InMemory, Record, outcomes, record_rows, row_keys

FIRST_BUCKET = 32  # positions; every further bucket is as long as all before it


@dataclass(frozen=True)
class Estimate:
    """A mean over rows, or a function of one, and its standard error; None where there is a single row."""

    value: float
    error: float | None


@dataclass(frozen=True)
class TextScore:
    """Perplexity; KL(teacher || student) in nats a token, None without a teacher; number of `tokens` read.

    `by_position` has {"from", "to", "perplexity", "perplexity_se", "kl", "kl_se"} of every bucket of positions.
    """

    perplexity: Estimate
    kl: Estimate | None
    tokens: int
    by_position: list[dict[str, Any]]


def text_rows(stream: np.ndarray, lengths: Sequence[int], tokens: int, seed: int) -> dict[int, Tensor]:
    """By length, windows of a token stream without overlap: (R, T) int64, about `tokens` in all, one row at least.

    Windows of the longest length are drawn, and cut up for the shorter ones: every length reads the same text, so that
    figures differ by context alone. Raises HyloError if the stream is shorter than the longest.
    """
    longest = max(lengths)
    slots = len(stream) // longest
    if slots == 0:
        raise HyloError(f"the held-out text has {len(stream)} tokens, fewer than one row of {longest}; give more text")
    rng = np.random.default_rng(seed)
    offset = rng.integers(0, len(stream) - slots * longest + 1)
    starts = offset + longest * rng.permutation(slots)[: max(1, tokens // longest)]
    windows = torch.from_numpy(np.stack([stream[start : start + longest] for start in starts]).astype(np.int64))
    return {n: windows[:, : longest // n * n].reshape(-1, n) for n in lengths}


def bucket_edges(length: int) -> list[int]:
    """0, 32, 64, 128, ... `length`: position t, from 0, is what is predicted after reading t + 1 tokens."""
    edges, edge = [0], FIRST_BUCKET
    while edge < length - 1:  # the last position has no next token, so a bucket of it alone would have no perplexity
        edges.append(edge)
        edge *= 2
    return [*edges, length]


def text_score(student: Scorer, rows: Tensor, teacher: Teacher | None = None) -> TextScore:
    """Of rows (R, T): the T - 1 next tokens for perplexity, all T distributions for KL.

    Raises RuntimeError if a row cannot be read.
    """
    keys, done = row_keys("row", len(rows)), InMemory()
    record_rows(rows, keys, lambda ids, _: row_sums(student, ids, teacher), done)
    good, errors = outcomes(keys, done)
    if errors:
        raise RuntimeError(errors[0])
    return text_summary(good, rows.shape[1])


@torch.no_grad()
def row_sums(student: Scorer, ids: Tensor, teacher: Teacher | None = None) -> list[Record]:
    """Of every row of (B, T) the sums over each bucket of positions: {"loss": [nats], "kl": [nats] with a teacher}.

    The log-softmax is taken in float32 over tiles of tokens, so no (T, V) tensor larger than a tile is ever held.
    """
    tile = max(1, TILE_LOGITS // student.vocabulary)
    B, T = ids.shape
    edges = bucket_edges(T)
    following = ids.roll(-1, 1).to(student.device)
    scored = torch.ones_like(following, dtype=torch.bool)
    scored[:, -1] = False  # nothing follows the last token
    bucket_T = torch.bucketize(
        torch.arange(T, device=student.device), torch.tensor(edges[1:-1]).to(student.device), right=True
    )
    cell_BT = torch.arange(B, device=student.device)[:, None] * (len(edges) - 1) + bucket_T
    loss = torch.zeros(B * (len(edges) - 1), dtype=torch.float64, device=student.device)
    kl = loss.clone()
    parts = [student.hidden(ids).flatten(0, 1), following.flatten(), scored.flatten(), cell_BT.flatten()]
    if teacher is not None:
        parts.append(teacher.remembered(ids).flatten(0, 1))
    for hidden_ND, following_N, scored_N, cell_N, *teacher_ND in zip(*(p.split(tile) for p in parts), strict=True):
        log_q_NV = student.logits(hidden_ND).log_softmax(-1)
        loss_N = -log_q_NV.gather(1, following_N[:, None])[:, 0].double()
        loss.index_add_(0, cell_N, loss_N.where(scored_N, 0))
        if teacher is not None:
            log_p_NV = teacher.logits(teacher_ND[0]).log_softmax(-1)
            kl.index_add_(0, cell_N, (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1).double())
    if not (loss.isfinite().all() and kl.isfinite().all()):
        raise ValueError("the models' probabilities are not finite")
    sums = {"loss": loss.view(B, -1).tolist()} | ({} if teacher is None else {"kl": kl.view(B, -1).tolist()})
    return [{key: values[row] for key, values in sums.items()} for row in range(B)]


def text_summary(sums: Sequence[Record], length: int) -> TextScore:
    """Of what `row_sums` found, of rows of `length` tokens."""
    edges = bucket_edges(length)
    positions = np.diff(edges)
    scored = positions - np.eye(len(positions), dtype=int)[-1]  # the last bucket ends where nothing follows
    loss = np.array([record["loss"] for record in sums])
    perplexity = _perplexity(loss.sum(1) / scored.sum())
    buckets: list[dict[str, Any]] = []
    for i, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        of_bucket = _perplexity(loss[:, i] / scored[i])
        buckets.append(
            {"from": begin, "to": end, "perplexity": of_bucket.value, "perplexity_se": of_bucket.error},
        )
    divergence = None
    if "kl" in sums[0]:
        kl = np.array([record["kl"] for record in sums])
        divergence = mean_of(kl.sum(1) / length)
        for i, bucket in enumerate(buckets):
            here = mean_of(kl[:, i] / positions[i])
            bucket |= {"kl": here.value, "kl_se": here.error}
    return TextScore(perplexity, divergence, len(sums) * length, buckets)


def mean_of(rows: np.ndarray) -> Estimate:
    return Estimate(float(rows.mean()), float(rows.std(ddof=1) / math.sqrt(len(rows))) if len(rows) > 1 else None)


def _perplexity(loss: np.ndarray) -> Estimate:
    """exp of the mean over rows; its standard error by the delta method, exp(mean) times that of the mean."""
    mean = mean_of(loss)
    value = float(np.exp(mean.value))
    return Estimate(value, None if mean.error is None else value * mean.error)
