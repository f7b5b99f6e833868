"""The state-space recurrence of Mamba-2 (Dao and Gu, arXiv 2405.21060), with grouped x and B as the recipe has them.

    h_t = exp(-exp(A_log) dt_t) h_(t-1) + dt_t x_t B_t^T,   y_t = h_t C_t + D x_t,   dt = softplus(dt + dt_bias)

`ssd` runs chunk by chunk (section 6 of the paper): attention-like products within chunks, a state between them. Packed
documents are cut into chunks each by itself, and every step of the loop takes all documents that have another chunk.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hylo.ops.chunks import Chunks, make_chunks

CHUNK = 64


def ssd(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x (B,T,G,P), B (B,T,G,N), C (B,T,H,N), dt (B,T,H) before softplus (-inf: the token neither writes nor decays);
    A_log, D, dt_bias (H); state (sequences,H,P,N). H is a multiple of G, head h reads group h // (H/G).

    cu_seqlens (sequences + 1): B = 1 row packs documents with these bounds, each with a state of its own
    (0 <= ... <= T, on the CPU if it can be; empty documents keep their state); None: every row is a sequence.
    Returns y (B,T,H,P) in x's type and the last states or None. The core runs in float32, in float64 where x is
    float64. Raises ValueError for bounds that do not fit.
    """
    with torch.autocast(x.device.type, enabled=False):
        x_, dt_, g, B_, C_ = _prepare(x, dt, A_log, B, C, dt_bias)
        if initial_state is None:
            sequences = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
            initial_state = x_.new_zeros(sequences, C.shape[2], x.shape[3], B.shape[3])
        initial_state = initial_state.to(x_.dtype)
        if x.shape[1] == 1 and cu_seqlens is None:
            y, state = _step(x_, dt_, g, B_, C_, initial_state)
        else:
            y, state = _chunked(x_, dt_, g, B_, C_, initial_state, make_chunks(x, cu_seqlens, CHUNK))
        if D is not None:
            y = y + D.to(y.dtype)[:, None] * x_.repeat_interleave(C.shape[2] // x.shape[2], 2)
    return y.to(x.dtype), state if output_final_state else None


def naive_ssd(
    x: Tensor,
    dt: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same, token by token as the equations have it."""
    x_, dt_, g, B_, C_ = _prepare(x, dt, A_log, B, C, dt_bias)
    repeats = C.shape[2] // x.shape[2]
    x_, B_ = x_.repeat_interleave(repeats, 2), B_.repeat_interleave(repeats, 2)
    bounds = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    if initial_state is None:
        initial_state = x_.new_zeros(len(x) * (len(bounds) - 1), C.shape[2], x.shape[3], B.shape[3])
    outputs, states = [], []
    for start, end, state in zip(bounds[:-1], bounds[1:], initial_state.split(len(x)), strict=True):
        for t in range(start, end):
            write = torch.einsum("bh,bhp,bhn->bhpn", dt_[:, t], x_[:, t], B_[:, t])
            state = state * g[:, t, :, None, None].exp() + write
            outputs.append(torch.einsum("bhpn,bhn->bhp", state, C_[:, t]))
        states.append(state)
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D.to(y.dtype)[:, None] * x_
    return y.to(x.dtype), torch.cat(states) if output_final_state else None


def _prepare(x: Tensor, dt: Tensor, A_log: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor | None) -> tuple[Tensor, ...]:
    """Core type, positive dt, and g = -exp(A_log) dt, the log decay."""
    core = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, dt, A_log, B, C = (t.to(core) for t in (x, dt, A_log, B, C))
    dt = F.softplus(dt if dt_bias is None else dt + dt_bias.to(core))
    return x, dt, -A_log.exp() * dt, B, C


def _step(x: Tensor, dt: Tensor, g: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    repeats = C.shape[2] // x.shape[2]
    x, B = (t[:, 0].repeat_interleave(repeats, 1) for t in (x, B))
    state = state * g[:, 0, :, None, None].exp() + (dt[:, 0, :, None] * x)[..., None] * B[:, :, None]
    return (state @ C[:, 0, :, :, None])[:, None, ..., 0], state


def _chunked(
    x: Tensor, dt: Tensor, g: Tensor, B: Tensor, C: Tensor, state: Tensor, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """S chunks of L tokens, G groups of R heads. The R heads of a group are rows of one product, none is repeated."""
    G, P, N = *x.shape[2:], B.shape[-1]
    R, L, S = C.shape[2] // G, chunks.length, sum(chunks.steps)
    x, B = chunks.split(x), chunks.split(B)  # (S,G,L,.)
    C = chunks.split(C).reshape(S, G, R * L, N)
    dt, g = (chunks.split(t).reshape(S, G, R, L) for t in (dt, g))
    g = g.cumsum(-1)

    later = torch.ones(L, L, dtype=torch.bool, device=x.device).triu(1)
    # Masked before exp: the differences above the diagonal are positive, and inf * 0 is NaN in backward.
    decay = (g[..., :, None] - g[..., None, :]).masked_fill(later, float("-inf")).exp()
    scores = (C @ B.transpose(-1, -2)).view_as(decay) * decay * dt[..., None, :]
    y = (scores.view(S, G, R * L, L) @ x).view(S, G, R, L, P)

    to_end = dt * (g[..., -1:] - g).exp()
    written = (to_end[..., None] * x[:, :, None]).transpose(-1, -2).reshape(S, G, R * P, L) @ B
    ends = g[..., -1].exp()[..., None, None]
    last, finished, before = chunks.ordered(state).view(-1, G, R, P, N), [], []
    for write, end in zip(written.view(S, G, R, P, N).split(chunks.steps), ends.split(chunks.steps), strict=True):
        if len(write) < len(last):
            finished.append(last[len(write) :])
            last = last[: len(write)]
        before.append(last)
        last = torch.addcmul(write, end, last)
    last = torch.cat((last, *reversed(finished)))
    states = torch.cat((*before, last[:0]))
    y = y + (C.view(S, G, R, L, N) * g[..., None].exp()) @ states.transpose(-1, -2)
    return chunks.join(y.flatten(1, 2)), chunks.restored(last.view_as(state))
