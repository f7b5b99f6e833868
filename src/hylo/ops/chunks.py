"""Cuts sequences into chunks of equal length, and chunks into segments: what the chunked recurrences work off at once.

Everything inside a segment is computed for all its chunks together, in buffers that the next segment uses again; only
states go from one to the next. So neither memory nor time per token grows with the length.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SEGMENT_BYTES = {"cpu": 4 << 20}  # of a segment's buffers: what a core's cache holds beside a state
SEGMENT_BYTES_ELSEWHERE = 512 << 20
LEAST_DECAY = -1000.0  # whose exponential is zero in every type


class Segment(NamedTuple):
    """The chunks of a few consecutive steps."""

    first_step: int
    steps: list[int]
    start: int  # its first chunk
    stop: int  # the one after its last
    slots: Tensor | None = None  # packed rows: which of its (stop - start) * C slots hold tokens,
    tokens: Tensor | None = None  # and which tokens


class Chunks(NamedTuple):
    """S chunks of C tokens: the first chunk of every sequence, then the second of those that have one, and so on.

    A recurrence over chunks goes on with `steps[n]` sequences at its n-th step, always the first ones: sequences are
    ordered by their number of chunks. The last chunk of a sequence is filled up with zeros.
    """

    length: int  # C
    steps: list[int]  # adds up to S
    shape: tuple[int, int]  # (B,T) of the tokens
    slots_T: Tensor | None = None  # packed rows: where each token goes among the S*C,
    bounds: list[int] | None = None  # how many tokens stand before each chunk, and their order by slot
    tokens_T: Tensor | None = None
    order_N: Tensor | None = None  # the sequences, longest first
    rank_N: Tensor | None = None  # and each one's place in that order

    def segments(self, chunk_bytes: int, device: torch.device) -> Iterator[Segment]:
        """As many steps at a time as fit the device's share, of chunks whose buffers take `chunk_bytes`."""
        limit = max(1, SEGMENT_BYTES.get(device.type, SEGMENT_BYTES_ELSEWHERE) // chunk_bytes)
        first, start = 0, 0
        while first < len(self.steps):
            last, stop = first + 1, start + self.steps[first]
            while last < len(self.steps) and stop + self.steps[last] - start <= limit:
                stop += self.steps[last]
                last += 1
            yield self._segment(first, self.steps[first:last], start, stop)
            first, start = last, stop

    def _segment(self, first: int, steps: list[int], start: int, stop: int) -> Segment:
        if self.slots_T is None or self.tokens_T is None or self.bounds is None:
            return Segment(first, steps, start, stop)
        tokens = self.tokens_T[self.bounds[start] : self.bounds[stop]]
        return Segment(first, steps, start, stop, self.slots_T[tokens] - start * self.length, tokens)

    def gather(self, x_BTH: Tensor, segment: Segment, dtype: torch.dtype) -> Tensor:
        """A segment's tokens of (B,T,H,...) as (chunks,H,C,...), a copy in `dtype`, zero where there is no token."""
        C, count = self.length, segment.stop - segment.start
        if segment.slots is None:
            N, start = len(segment.steps), segment.first_step * C
            x = x_BTH[:, start : start + N * C]
            if (missing := N * C - x.shape[1]) > 0:
                x = F.pad(x, (*(0, 0) * (x.ndim - 2), 0, missing))
            x = x.unflatten(1, (N, C)).transpose(0, 1).transpose(2, 3)
            return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x).flatten(0, 1)
        assert segment.tokens is not None
        x = x_BTH.new_zeros(count * C, *x_BTH.shape[2:], dtype=dtype)
        x.index_copy_(0, segment.slots, x_BTH[0].index_select(0, segment.tokens).to(dtype))
        return x.unflatten(0, (count, C)).transpose(1, 2).contiguous()

    def scatter(self, x_SHC: Tensor, segment: Segment, out_BTH: Tensor) -> None:
        """The reverse: writes a segment's (chunks,H,C,...) to its tokens of `out` (B,T,H,...)."""
        C = self.length
        if segment.slots is None:
            N, start = len(segment.steps), segment.first_step * C
            out = out_BTH[:, start : start + N * C]
            x = x_SHC.unflatten(0, (N, -1))  # (N,B,H,C,...)
            whole = out.shape[1] // C
            out[:, : whole * C].unflatten(1, (whole, C)).copy_(x[:whole].transpose(0, 1).transpose(2, 3))
            if whole < N:
                rest = out.shape[1] - whole * C
                out[:, whole * C :].copy_(x[whole, :, :, :rest].transpose(1, 2))
            return
        assert segment.tokens is not None
        x = x_SHC.transpose(1, 2).flatten(0, 1).index_select(0, segment.slots)
        out_BTH[0].index_copy_(0, segment.tokens, x.to(out_BTH.dtype))

    def ordered(self, state: Tensor) -> Tensor:
        """A copy of a tensor whose first dimension is the sequence, longest sequence first."""
        return state.clone() if self.order_N is None else state.index_select(0, self.order_N)

    def restored(self, state: Tensor) -> Tensor:
        """The reverse of `ordered`."""
        return state if self.rank_N is None else state.index_select(0, self.rank_N)


def make_chunks(tokens: Tensor, cu_seqlens: Tensor | None, longest: int, doubling: bool = False) -> Chunks:
    """Chunks of at most `longest` tokens for `tokens` (B,T,...): rows, or documents packed in one row.

    cu_seqlens (N+1): the documents' bounds, from 0 to T; their values steer Python, so they are best on the CPU.
    doubling: a chunk's length is a power of two, as `longest` is then.
    """
    B, T = tokens.shape[:2]
    if cu_seqlens is None:
        C = _chunk_length(T, longest, doubling)
        return Chunks(C, [B] * -(-T // C), (B, T))
    bounds = cu_seqlens.to("cpu", torch.long)
    lengths, N = bounds.diff(), len(bounds) - 1
    C = _chunk_length(int(lengths.max()), longest, doubling)
    counts = (lengths + (C - 1)) // C
    order = counts.argsort(descending=True, stable=True)
    rank = order.argsort()
    steps = N - counts.bincount().cumsum(0)[:-1]  # how many sequences have more than n chunks
    sequence_T = torch.arange(N, device="cpu").repeat_interleave(lengths)
    position_T = torch.arange(T, device="cpu") - bounds[sequence_T]
    chunk_T = (steps.cumsum(0) - steps)[position_T // C] + rank[sequence_T]
    before = F.pad(chunk_T.bincount(minlength=int(steps.sum())).cumsum(0), (1, 0)).tolist()
    slots = chunk_T * C + position_T % C
    slots, tokens_T, order, rank = (t.to(tokens.device) for t in (slots, slots.argsort(), order, rank))
    return Chunks(C, steps.tolist(), (B, T), slots, before, tokens_T, order, rank)


def _chunk_length(tokens: int, longest: int, doubling: bool) -> int:
    length = max(1, min(longest, tokens))
    return min(longest, 1 << (length - 1).bit_length()) if doubling else length


def kept_chunks(
    tokens: Tensor, cu_seqlens: Tensor | None, longest: int, keeping: bool, doubling: bool = False
) -> tuple[Any, Any]:
    """How many chunks `make_chunks` makes, and of what length, where only shapes are known (torch.compile)."""
    B, T = tokens.shape[:2]
    if cu_seqlens is not None:
        context = torch.library.get_ctx()
        return context.new_dynamic_size() if keeping else 0, context.new_dynamic_size()
    C = _chunk_length(T, longest, doubling)
    return B * -(-T // C) if keeping else 0, C


def check_packed(tokens: Tensor, cu_seqlens: Tensor) -> None:
    """Raises ValueError for documents' bounds that do not fit `tokens` (B,T,...)."""
    if tokens.shape[0] != 1:
        raise ValueError(f"cu_seqlens goes with one packed row; got a batch of {tokens.shape[0]}")
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens.shape[1] or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to {tokens.shape[1]}, the length; got {cu_seqlens.tolist()}")


def decays(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From log decays (...,C): exp(G), exp(G_C - G) and the lower triangle of exp(G_i - G_j), G their running sum.

    The sum is in float64, where there is one: after one strong decay, differences of a float32 sum keep few digits.
    Differences above the diagonal are masked before exp: they are positive, and inf * 0 is NaN.
    """
    G = g.to(_wide(g)).clamp(min=LEAST_DECAY).cumsum(-1)
    C = g.shape[-1]
    later = torch.ones(C, C, dtype=torch.bool, device=g.device).triu(1)
    between = (G[..., :, None] - G[..., None, :]).to(g.dtype).masked_fill_(later, float("-inf")).exp_()
    return G.to(g.dtype).exp(), (G[..., -1:] - G).to(g.dtype).exp(), between


def decay_gradient(from_start: Tensor, to_end: Tensor, between: Tensor, whole: Tensor) -> Tensor:
    """The gradient of g (...,C) from those of the decays, each times its decay.

    from_start, to_end (...,C); between (...,C,C); whole (...): of exp(G_C) that the state decays by. Most of the terms
    cancel in the sums below, exactly so in float64; a rest left by rounding would be multiplied by a strong decay's g.
    """
    wide = _wide(between)
    to_end = to_end.to(wide)
    dG = from_start + between.sum(-1, dtype=wide) - between.sum(-2, dtype=wide) - to_end
    dG[..., -1] += to_end.sum(-1) + whole
    return dG.flip(-1).cumsum(-1).flip(-1).to(between.dtype)


def unit_lower_inverse(A: Tensor) -> Tensor:
    """(I + tril(A, -1))^-1 of (M,C,C)."""
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    return torch.linalg.solve_triangular(A, identity, upper=False, unitriangular=True)


def _wide(x: Tensor) -> torch.dtype:
    return x.dtype if x.device.type == "mps" else torch.float64


class StateScan:
    """The states of a recurrence over chunks: `before()` a step, then `after(decay)` it, which the step's writes go to.

    `last` (M,...), the first states of all sequences and heads, longest sequence first, becomes the last ones in place;
    `kept` (sum of steps,...), zeros, where a gradient will want them, takes the state before every step without a copy
    more. from_zero: the first states are zeros.
    """

    def __init__(self, last: Tensor, steps: list[int], kept: Tensor | None, from_zero: bool = False) -> None:
        self.last, self.steps, self.kept, self.step, self.stop = last, steps, kept, 0, 0
        if kept is not None and steps and not from_zero:
            kept[: steps[0]] = last[: steps[0]]

    def before(self) -> Tensor:
        count = self.steps[self.step]
        if self.kept is None:
            return self.last[:count]
        if self.step and count != self.steps[self.step - 1]:
            self.kept[self.stop : self.stop + count] = self.last[:count]
        return self.kept[self.stop : self.stop + count]

    def after(self, decay: Tensor) -> Tensor:
        """The state times its decay, still without what the step writes; the next step's `before` or the last."""
        state, count = self.before(), self.steps[self.step]
        self.step, self.stop = self.step + 1, self.stop + count
        if self.kept is None:
            return state.mul_(decay)
        goes_on = self.step < len(self.steps) and self.steps[self.step] == count
        target = self.kept[self.stop : self.stop + count] if goes_on else self.last[:count]
        return torch.mul(state, decay, out=target)
