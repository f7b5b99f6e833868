"""Padding and packing, which are one thing to a linear block: a row of documents, one after the other, without padding.

A padded batch is a document per row, its real tokens; a packed row is several. Linear blocks run over the real tokens
alone (`pack`, `unpack`), with the documents' bounds. Attention takes documents one by one, and padding (of cached rows,
which stay rows) as which tokens are real: nobody makes a matrix of row by row.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """N documents, of S real tokens together, in a batch of shape (B,T)."""

    cu_seqlens: Tensor  # (N+1,) on the CPU, from 0 to S; N = B where `packed` is not set, and some may be empty
    tokens_S: Tensor | None  # which of the B*T tokens are real; None: all
    shape: tuple[int, int]
    packed: bool  # whether a row holds several

    @property
    def lengths(self) -> list[int]:
        return self.cu_seqlens.diff().tolist()

    def positions(self) -> Tensor:
        """Each real token's place in its document, (1,S)."""
        starts = self.cu_seqlens[:-1].repeat_interleave(self.cu_seqlens.diff())
        return (torch.arange(len(starts), device="cpu") - starts)[None]


def find_documents(
    shape: tuple[int, int],
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Documents | None:
    """The documents of a batch (B,T), as the first of these tells them; None: every row is one, without padding.

    cu_seq_lens_q (N+1): bounds among all B*T tokens. seq_idx (B,T): changes from one document to the next. position_ids
    (B,T): do not rise from one document to the next. A row's end is a document's end. attention_mask (B, past + T),
    zero on padding, which belongs to no document; one of four dimensions tells nothing.
    Raises ValueError if cu_seq_lens_q does not end with the batch.
    """
    B, T = shape
    if attention_mask is not None and attention_mask.ndim != 2:
        return None
    tokens = None
    if attention_mask is not None:
        real = attention_mask[:, -T:].bool()
        if not real.all():
            tokens = real.flatten().nonzero()[:, 0]
    hints = [hint for hint in (cu_seq_lens_q, seq_idx, position_ids) if hint is not None]
    if hints and T > 1:
        flat = torch.arange(B * T, device=hints[0].device) if tokens is None else tokens
        rows = flat // T
        row_ends = rows[1:] != rows[:-1]
        if cu_seq_lens_q is not None:
            if cu_seq_lens_q[-1] != B * T:
                raise ValueError(f"cu_seq_lens_q ends at {int(cu_seq_lens_q[-1])}, but there are {B * T} tokens")
            document = torch.bucketize(flat, cu_seq_lens_q.to(flat), right=True)
            ends = document[1:] != document[:-1]
        elif seq_idx is not None:
            document = seq_idx.expand(B, T).flatten()[flat]
            ends = document[1:] != document[:-1]
        else:
            position = hints[0].expand(B, T).flatten()[flat]
            ends = position[1:] <= position[:-1]
        if (ends & ~row_ends).any():
            inner = (ends | row_ends).nonzero()[:, 0].cpu() + 1
            cu_seqlens = torch.cat((inner.new_zeros(1), inner, inner.new_tensor([len(flat)])))
            return Documents(cu_seqlens, tokens, (B, T), packed=True)
    if tokens is None:
        return None
    counts = real.sum(1).cpu()
    return Documents(torch.cat((counts.new_zeros(1), counts.cumsum(0))), tokens, (B, T), packed=False)


class Visible(NamedTuple):
    """What queries see, to an attention layer; without any of these, the tokens up to their own."""

    mask: Tensor | None = None  # (B,H,T,S) or what broadcasts to it, in place of causality
    padding_BS: Tensor | None = None  # boolean, True on real tokens
    documents: Documents | None = None
    filled: int | None = None  # how many tokens of a cache with room for more


def pack(x_BTD: Tensor, documents: Documents | None) -> Tensor:
    """The real tokens in one row, (1,S,D); x itself where there are no documents."""
    if documents is None:
        return x_BTD
    x = x_BTD.flatten(0, 1)
    return (x if documents.tokens_S is None else x.index_select(0, documents.tokens_S))[None]


def unpack(x_1SD: Tensor, documents: Documents | None) -> Tensor:
    """The reverse: (B,T,D), zero on padding."""
    if documents is None:
        return x_1SD
    B, T = documents.shape
    if documents.tokens_S is None:
        return x_1SD[0].unflatten(0, (B, T))
    return x_1SD.new_zeros(B * T, x_1SD.shape[2]).index_copy(0, documents.tokens_S, x_1SD[0]).unflatten(0, (B, T))
