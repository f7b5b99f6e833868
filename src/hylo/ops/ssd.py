"""The state-space recurrence of Mamba-2 (Dao and Gu, arXiv 2405.21060), with grouped x and B as the recipe has them.

    h_t = exp(-exp(A_log) dt_t) h_(t-1) + dt_t x_t B_t^T,   y_t = h_t C_t + D x_t,   dt = softplus(dt + dt_bias)

`ssd` runs chunk by chunk (section 6 of the paper): attention-like products within chunks, a state between them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

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
) -> tuple[Tensor, Tensor | None]:
    """x (B,T,G,P), B (B,T,G,N), C (B,T,H,N), dt (B,T,H) before softplus (-inf: the token neither writes nor decays);
    A_log, D, dt_bias (H); state (B,H,P,N). H is a multiple of G, head h reads group h // (H/G).

    Returns y (B,T,H,P) in x's type and the last state or None. The core runs in float32, in float64 where x is float64.
    """
    with torch.autocast(x.device.type, enabled=False):
        x_, dt_, g, B_, C_ = _prepare(x, dt, A_log, B, C, dt_bias)
        if initial_state is None:
            initial_state = x_.new_zeros(x.shape[0], C.shape[2], x.shape[3], B.shape[3])
        run = _step if x.shape[1] == 1 else _chunked
        y, state = run(x_, dt_, g, B_, C_, initial_state.to(x_.dtype))
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
) -> tuple[Tensor, Tensor | None]:
    """The same, token by token as the equations have it."""
    x_, dt_, g, B_, C_ = _prepare(x, dt, A_log, B, C, dt_bias)
    repeats = C.shape[2] // x.shape[2]
    x_, B_ = x_.repeat_interleave(repeats, 2), B_.repeat_interleave(repeats, 2)
    state = x_.new_zeros(x.shape[0], C.shape[2], x.shape[3], B.shape[3]) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        write = torch.einsum("bh,bhp,bhn->bhpn", dt_[:, t], x_[:, t], B_[:, t])
        state = state * g[:, t, :, None, None].exp() + write
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C_[:, t]))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D.to(y.dtype)[:, None] * x_
    return y.to(x.dtype), state if output_final_state else None


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


def _chunked(x: Tensor, dt: Tensor, g: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """G groups of R heads, L chunks of S tokens. The R heads of a group are rows of one product, none is repeated."""
    batch, T, G, P = x.shape
    N, R, S = B.shape[-1], C.shape[2] // G, min(CHUNK, T)
    L = -(-T // S)
    padding = L * S - T  # padded tokens have dt = 0: they neither write nor decay
    x, B = (F.pad(t, (0, 0, 0, 0, 0, padding)).view(batch, L, S, G, -1).transpose(2, 3) for t in (x, B))
    C = F.pad(C, (0, 0, 0, 0, 0, padding)).view(batch, L, S, G, R, N).permute(0, 1, 3, 4, 2, 5)
    dt, g = (F.pad(t, (0, 0, 0, padding)).view(batch, L, S, G, R).permute(0, 1, 3, 4, 2) for t in (dt, g))
    g = g.cumsum(-1)  # (batch,L,G,R,S), like dt

    later = torch.ones(S, S, dtype=torch.bool, device=x.device).triu(1)
    # Masked before exp: the differences above the diagonal are positive, and inf * 0 is NaN in backward.
    decay = (g[..., :, None] - g[..., None, :]).masked_fill(later, float("-inf")).exp()
    scores = (C.reshape(batch, L, G, R * S, N) @ B.transpose(-1, -2)).view_as(decay) * decay * dt[..., None, :]
    y = (scores.reshape(batch, L, G, R * S, S) @ x).view(batch, L, G, R, S, P)

    to_end = dt * (g[..., -1:] - g).exp()
    written = (to_end[..., None] * x[:, :, :, None]).transpose(-1, -2).reshape(batch, L, G, R * P, S) @ B
    written = written.view(batch, L, G, R, P, N)
    state = state.view(batch, G, R, P, N)
    before = []
    for write, end in zip(written.unbind(1), g[..., -1].exp()[..., None, None].unbind(1), strict=True):
        before.append(state)
        state = torch.addcmul(write, end, state)
    states = torch.stack(before, dim=1)
    y = y + (C * g[..., None].exp()) @ states.transpose(-1, -2)
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, L * S, G * R, P)[:, :T]
    return y, state.reshape(batch, G * R, P, N)
