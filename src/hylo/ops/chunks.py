"""Cuts sequences into chunks of equal length: what the chunked recurrences compute at once, and in which order."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Chunks(NamedTuple):
    """S chunks of C tokens: the first chunk of every sequence, then the second of those that have one, and so on.

    A recurrence over chunks goes on with `steps[n]` sequences at its n-th step, always the first ones: sequences are
    ordered by their number of chunks. The last chunk of a sequence is filled up with zeros.
    """

    length: int  # C
    steps: list[int]  # adds up to S
    shape: tuple[int, int]  # (B,T) of the tokens
    slots_T: Tensor | None = None  # where packed tokens go among the S*C
    order_N: Tensor | None = None  # the sequences, longest first
    rank_N: Tensor | None = None  # and each one's place in that order

    def split(self, x_BTH: Tensor) -> Tensor:
        """(B,T,H,...) -> (S,H,C,...)."""
        C = self.length
        if self.slots_T is None:
            N = len(self.steps)
            x_BTH = F.pad(x_BTH, (*(0, 0) * (x_BTH.ndim - 2), 0, N * C - x_BTH.shape[1]))
            return x_BTH.unflatten(1, (N, C)).transpose(0, 1).transpose(2, 3).flatten(0, 1)
        x = x_BTH.new_zeros(sum(self.steps) * C, *x_BTH.shape[2:]).index_copy(0, self.slots_T, x_BTH.flatten(0, 1))
        return x.unflatten(0, (sum(self.steps), C)).transpose(1, 2)

    def join(self, x_SHC: Tensor) -> Tensor:
        """(S,H,C,...) -> (B,T,H,...)."""
        B, T = self.shape
        if self.slots_T is None:
            x = x_SHC.unflatten(0, (len(self.steps), B)).transpose(0, 1).transpose(2, 3)
            return x.flatten(1, 2)[:, :T]
        return x_SHC.transpose(1, 2).flatten(0, 1).index_select(0, self.slots_T).unflatten(0, (B, T))

    def ordered(self, state: Tensor) -> Tensor:
        """A tensor whose first dimension is the sequence, longest sequence first."""
        return state if self.order_N is None else state.index_select(0, self.order_N)

    def restored(self, state: Tensor) -> Tensor:
        """The reverse of `ordered`."""
        return state if self.rank_N is None else state.index_select(0, self.rank_N)


def make_chunks(tokens: Tensor, cu_seqlens: Tensor | None, longest: int) -> Chunks:
    """Chunks of at most `longest` tokens for `tokens` (B,T,...): rows, or documents packed in one row.

    cu_seqlens (N+1): the documents' bounds, from 0 to T; their values steer Python, so they are best on the CPU.
    Raises ValueError if they do not fit the tokens.
    """
    B, T = tokens.shape[:2]
    if cu_seqlens is None:
        C = max(1, min(longest, T))
        return Chunks(C, [B] * -(-T // C), (B, T))
    check_packed(tokens, cu_seqlens)
    bounds = cu_seqlens.to("cpu", torch.long)
    lengths, N = bounds.diff(), len(bounds) - 1
    C = max(1, min(longest, int(lengths.max())))
    counts = (lengths + (C - 1)) // C
    order = counts.argsort(descending=True, stable=True)
    rank = order.argsort()
    steps = N - counts.bincount().cumsum(0)[:-1]  # how many sequences have more than n chunks
    sequence_T = torch.arange(N, device="cpu").repeat_interleave(lengths)
    position_T = torch.arange(T, device="cpu") - bounds[sequence_T]
    chunk_T = (steps.cumsum(0) - steps)[position_T // C] + rank[sequence_T]
    slots, order, rank = (t.to(tokens.device) for t in (chunk_T * C + position_T % C, order, rank))
    return Chunks(C, steps.tolist(), (B, T), slots, order, rank)


def check_packed(tokens: Tensor, cu_seqlens: Tensor) -> None:
    if tokens.shape[0] != 1:
        raise ValueError(f"cu_seqlens goes with one packed row; got a batch of {tokens.shape[0]}")
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens.shape[1] or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to {tokens.shape[1]}, the length; got {cu_seqlens.tolist()}")
