"""The gated delta rule of Gated DeltaNet (Yang et al., arXiv 2412.06464), equation 10.

    S_t = exp(g_t) S_(t-1),   S_t <- S_t + k_t (beta_t (v_t - S_t^T k_t))^T,   o_t = scale S_t^T q_t

`gated_delta_rule` runs chunk by chunk (the WY form of arXiv 2406.06484, section 3.2, with decay): everything inside the
chunks is done for all chunks at once, and only the state goes from one to the next in a loop. Linear in T. Packed
documents are cut into chunks each by itself, and every step of the loop takes all documents that have another chunk.
"""

import torch
from torch import Tensor

from hylo.ops.chunks import Chunks, make_chunks

CHUNK = 64


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """q, k (B,T,Hk,K); v (B,T,Hv,V), Hv a multiple of Hk; g (log decay, <= 0) and beta (B,T,Hv); state (N,Hv,K,V).

    scale: K**-0.5 if None. cu_seqlens (N+1): B = 1 row packs N documents with these bounds, each with a state of its
    own (0 <= ... <= T, on the CPU if it can be; empty documents keep their state); None: N = B rows.
    Returns o (B,T,Hv,V) in v's type and the last states or None.
    The core runs in float32, or in float64 where v is float64. Raises ValueError for bounds that do not fit.
    """
    with torch.autocast(v.device.type, enabled=False):
        q_, k_, v_, g_, beta_ = _prepare(q, k, v, g, beta, scale, use_qk_l2norm)
        if initial_state is None:
            sequences = len(v) if cu_seqlens is None else len(cu_seqlens) - 1
            initial_state = v_.new_zeros(sequences, v.shape[2], k.shape[3], v.shape[3])
        initial_state = initial_state.to(v_.dtype)
        if v.shape[1] == 1 and cu_seqlens is None:
            o, state = _step(q_, k_, v_, g_, beta_, initial_state)
        else:
            o, state = _chunked(q_, k_, v_, g_, beta_, initial_state, make_chunks(v, cu_seqlens, CHUNK))
    return o.to(v.dtype), state if output_final_state else None


def naive_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same, token by token as the equations have it."""
    q_, k_, v_, g_, beta_ = _prepare(q, k, v, g, beta, scale, use_qk_l2norm)
    bounds = [0, v.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    if initial_state is None:
        initial_state = v_.new_zeros(len(v) * (len(bounds) - 1), v.shape[2], k.shape[3], v.shape[3])
    outputs, states = [], []
    for start, end, state in zip(bounds[:-1], bounds[1:], initial_state.split(len(v)), strict=True):
        for t in range(start, end):
            state = state * g_[:, t, :, None, None].exp()
            read = torch.einsum("bhkv,bhk->bhv", state, k_[:, t])
            write = beta_[:, t, :, None] * (v_[:, t] - read)
            state = state + torch.einsum("bhk,bhv->bhkv", k_[:, t], write)
            outputs.append(torch.einsum("bhkv,bhk->bhv", state, q_[:, t]))
        states.append(state)
    return torch.stack(outputs, dim=1).to(v.dtype), torch.cat(states) if output_final_state else None


def l2norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None, use_qk_l2norm: bool
) -> tuple[Tensor, ...]:
    """Core type, scaled queries, as many q/k heads as value heads."""
    core = torch.float64 if v.dtype == torch.float64 else torch.float32
    q, k, v, g, beta = (t.to(core) for t in (q, k, v, g, beta))
    if use_qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    q = q * (k.shape[-1] ** -0.5 if scale is None else scale)
    if (repeats := v.shape[2] // k.shape[2]) > 1:
        q, k = q.repeat_interleave(repeats, 2), k.repeat_interleave(repeats, 2)
    return q, k, v, g, beta


def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: (B,1,H,K), (B,1,H,V), (B,1,H) and the state (B,H,K,V)."""
    q, k, v, g, beta = (t.transpose(1, 2) for t in (q, k, v, g, beta))
    state = state * g.exp()[..., None]
    write = beta[..., None] * (v - k @ state)
    state = state + k.transpose(-1, -2) * write
    return (q @ state).transpose(1, 2), state


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """All of (B,T,H,.); below, the chunks and heads are M = S*H matrices of C rows.

    Within a chunk, with G the cumulative log decay and S the state before it, the writes U solve the unit lower
    triangular system (I + tril(beta K K^T exp(G_i - G_j), -1)) U = beta (V - exp(G) K S).
    """
    C, H = chunks.length, v.shape[2]
    q, k, v = (chunks.split(t).flatten(0, 1) for t in (q, k, v))
    beta, G = chunks.split(beta).reshape(-1, 1, C), chunks.split(g).reshape(-1, 1, C).cumsum(-1)

    later = torch.ones(C, C, dtype=torch.bool, device=k.device).triu(1)
    # Masked before exp: the differences above the diagonal are positive, and inf * 0 is NaN in backward.
    decay = (G.transpose(1, 2) - G).masked_fill(later, float("-inf")).exp()
    kT = k.transpose(1, 2)
    solve = _UnitLowerInverse.apply(k @ kT * decay * beta.transpose(1, 2)) * beta
    from_start, to_end = G.exp(), (G[..., -1:] - G).exp().transpose(1, 2)
    writes, states, last = _StateScan.apply(
        solve @ v,
        (solve * from_start) @ k,
        to_end * k,
        from_start[..., -1:],
        chunks.ordered(state).flatten(0, 1),
        [sequences * H for sequences in chunks.steps],
    )
    o = (q * from_start.transpose(1, 2)) @ states
    o = torch.baddbmm(o, q @ kT * decay, writes)
    return chunks.join(o.unflatten(0, (-1, H))), chunks.restored(last.view_as(state))


class _UnitLowerInverse(torch.autograd.Function):
    """(I + tril(A, -1))^-1 of (M,C,C). The gradient takes two products where torch's own would solve again."""

    @staticmethod
    def forward(ctx, A):  # type: ignore[no-untyped-def]
        identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
        inverse = torch.linalg.solve_triangular(A, identity, upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (inverse,) = ctx.saved_tensors
        transposed = inverse.transpose(1, 2)
        return -(transposed @ grad @ transposed).tril_(-1)


class _StateScan(torch.autograd.Function):
    """The recurrence over chunks, with its gradient as the same recurrence backwards.

        U_n = A_n - W_n S_n,   S_(n+1) = d_n S_n + E_n^T U_n

    A (M,C,V), W and E (M,C,K), d (M,1,1), S_0 (heads of all sequences,K,V) -> U (M,C,V), the S_n before each chunk
    (M,K,V), the last states. Step n takes the next steps[n] of the M, and that many states from the front.
    """

    @staticmethod
    def forward(ctx, A, W, E, d, S, steps):  # type: ignore[no-untyped-def]
        U, states, S = torch.empty_like(A), A.new_empty(len(A), *S.shape[1:]), S.clone()
        for A_n, W_n, E_n, d_n, U_n, S_n in zip(*(t.split(steps) for t in (A, W, E, d, U, states)), strict=True):
            after = S[: len(A_n)]
            S_n.copy_(after)
            torch.baddbmm(A_n, W_n, S_n, alpha=-1, out=U_n)
            after.mul_(d_n).baddbmm_(E_n.transpose(1, 2), U_n)
        ctx.save_for_backward(W, E, d, U, states)
        ctx.steps = steps
        return U, states, S

    @staticmethod
    def backward(ctx, dU, dstates, dS):  # type: ignore[no-untyped-def]
        W, E, d, U, states = ctx.saved_tensors
        dA, after, dS = torch.empty_like(U), torch.empty_like(states), dS.clone()  # `after`: the gradient of S_(n+1)
        parts = zip(*(t.split(ctx.steps) for t in (dU, dstates, W, E, d, dA, after)), strict=True)
        for dU_n, dstates_n, W_n, E_n, d_n, dA_n, after_n in reversed(list(parts)):
            before = dS[: len(dA_n)]
            after_n.copy_(before)
            torch.baddbmm(dU_n, E_n, after_n, out=dA_n)
            before.mul_(d_n).add_(dstates_n).baddbmm_(W_n.transpose(1, 2), dA_n, alpha=-1)
        dW = -(dA @ states.transpose(-1, -2))
        dE = U @ after.transpose(-1, -2)
        dd = (states * after).sum((-1, -2), keepdim=True)
        return dA, dW, dE, dd, dS, None
