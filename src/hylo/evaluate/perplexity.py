"""Perplexity on held-out text, and the divergence from a teacher, on the same rows and at every position."""

from dataclasses import dataclass

import numpy as np
import torch

from hylo.errors import HyloError
from hylo.evaluate.forward import TILE_LOGITS, Scorer, Teacher, batches


@dataclass(frozen=True)
class TextScore:
    """`perplexity`; `kl`, KL(teacher || student) in nats a token, None without a teacher; number of `tokens` read."""

    perplexity: float
    kl: float | None
    tokens: int


def text_rows(stream: np.ndarray, lengths: list[int], tokens: int, seed: int) -> dict[int, torch.Tensor]:
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


@torch.no_grad()
def text_score(student: Scorer, rows: torch.Tensor, teacher: Teacher | None = None) -> TextScore:
    """Scores every position of rows (R, T): the T - 1 next tokens for perplexity, all T distributions for KL.

    The log-softmax is taken in float32 over tiles of tokens, so no (T, V) tensor larger than a tile is ever held.
    """
    tile = max(1, TILE_LOGITS // student.vocabulary)
    loss = divergence = 0.0
    for ids in batches(rows):
        following = ids.roll(-1, 1).to(student.device)
        scored = torch.ones_like(following, dtype=torch.bool)
        scored[:, -1] = False  # nothing follows the last token
        parts = [student.hidden(ids).flatten(0, 1), following.flatten(), scored.flatten()]
        if teacher is not None:
            parts.append(teacher.remembered(ids).flatten(0, 1))
        for hidden_ND, following_N, scored_N, *teacher_ND in zip(*(part.split(tile) for part in parts), strict=True):
            log_q_NV = student.logits(hidden_ND).log_softmax(-1)
            loss -= log_q_NV.gather(1, following_N[:, None])[scored_N].sum(dtype=torch.float64).item()
            if teacher is not None:
                log_p_NV = teacher.logits(teacher_ND[0]).log_softmax(-1)
                kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
                divergence += kl_N.sum(dtype=torch.float64).item()
    perplexity = torch.tensor(loss / (len(rows) * (rows.shape[1] - 1)), dtype=torch.float64).exp().item()
    return TextScore(perplexity, None if teacher is None else divergence / rows.numel(), rows.numel())
