"""The gated delta rule of Gated DeltaNet (Yang et al., arXiv 2412.06464), equation 10.

    S_t = exp(g_t) S_(t-1),   S_t <- S_t + k_t (beta_t (v_t - S_t^T k_t))^T,   o_t = scale S_t^T q_t

`gated_delta_rule` runs chunk by chunk (the WY form of arXiv 2406.06484, section 3.2, with decay): everything inside the
chunks is done for all chunks at once, and only the state goes from one to the next in a loop. Linear in T.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

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
) -> tuple[Tensor, Tensor | None]:
    """q, k (B,T,Hk,K); v (B,T,Hv,V), Hv a multiple of Hk; g (log decay, <= 0) and beta (B,T,Hv); state (B,Hv,K,V).

    scale: K**-0.5 if None. Returns o (B,T,Hv,V) in v's type and the last state or None.
    The core runs in float32, or in float64 where v is float64.
    """
    with torch.autocast(v.device.type, enabled=False):
        q_, k_, v_, g_, beta_ = _prepare(q, k, v, g, beta, scale, use_qk_l2norm)
        if initial_state is None:
            initial_state = v_.new_zeros(*v_.shape[:2], k.shape[3], v.shape[3])
        run = _step if v.shape[1] == 1 else _chunked
        o, state = run(q_, k_, v_, g_, beta_, initial_state.to(v_.dtype))
    return o.transpose(1, 2).to(v.dtype), state if output_final_state else None


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
) -> tuple[Tensor, Tensor | None]:
    """The same, token by token as the equations have it."""
    q_BHTK, k_BHTK, v_BHTV, g_BHT, beta_BHT = _prepare(q, k, v, g, beta, scale, use_qk_l2norm)
    state = v_BHTV.new_zeros(*k_BHTK.shape[:2], k.shape[3], v.shape[3]) if initial_state is None else initial_state
    outputs = []
    for t in range(v.shape[1]):
        state = state * g_BHT[:, :, t, None, None].exp()
        read = torch.einsum("bhkv,bhk->bhv", state, k_BHTK[:, :, t])
        write = beta_BHT[:, :, t, None] * (v_BHTV[:, :, t] - read)
        state = state + torch.einsum("bhk,bhv->bhkv", k_BHTK[:, :, t], write)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q_BHTK[:, :, t]))
    o = torch.stack(outputs, dim=1).to(v.dtype)
    return o, state if output_final_state else None


def l2norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None, use_qk_l2norm: bool
) -> tuple[Tensor, ...]:
    """Heads before time, core type, scaled queries, as many q/k heads as value heads."""
    core = torch.float64 if v.dtype == torch.float64 else torch.float32
    q, k, v, g, beta = (t.to(core).transpose(1, 2) for t in (q, k, v, g, beta))
    if use_qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    q = q * (k.shape[-1] ** -0.5 if scale is None else scale)
    if (repeats := v.shape[1] // k.shape[1]) > 1:
        q, k = q.repeat_interleave(repeats, 1), k.repeat_interleave(repeats, 1)
    return q, k, v, g, beta


def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: (B,H,1,K), (B,H,1,V), (B,H,1) and the state (B,H,K,V)."""
    state = state * g[..., None].exp()
    write = beta[..., None] * (v - k @ state)
    state = state + k.transpose(-1, -2) * write
    return q @ state, state


def _chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """All of (B,H,T,.); C is the chunk length, N the number of chunks.

    Within a chunk, with G the cumulative log decay and S the state before it, the writes U solve the unit lower
    triangular system (I + tril(beta K K^T exp(G_i - G_j), -1)) U = beta (V - exp(G) K S).
    """
    B, H, T, K = k.shape
    V, C = v.shape[-1], min(CHUNK, T)
    N = -(-T // C)
    if padding := N * C - T:  # padded tokens have beta = 0 and g = 0: they neither write nor decay
        q, k, v = (F.pad(t, (0, 0, 0, padding)) for t in (q, k, v))
        g, beta = (F.pad(t, (0, padding)) for t in (g, beta))
    q, k, v = (t.reshape(B * H * N, C, -1) for t in (q, k, v))
    beta, G = beta.reshape(B * H * N, 1, C), g.reshape(B * H * N, 1, C).cumsum(-1)

    later = torch.ones(C, C, dtype=torch.bool, device=k.device).triu(1)
    # Masked before exp: the differences above the diagonal are positive, and inf * 0 is NaN in backward.
    decay = (G.transpose(1, 2) - G).masked_fill(later, float("-inf")).exp()
    kT = k.transpose(1, 2)
    solve = _UnitLowerInverse.apply(k @ kT * decay * beta.transpose(1, 2)) * beta
    from_start, to_end = G.exp(), (G[..., -1:] - G).exp().transpose(1, 2)
    writes, states, state = _StateScan.apply(
        *(t.view(B * H, N, C, -1) for t in (solve @ v, (solve * from_start) @ k, to_end * k)),
        from_start[..., -1].view(B * H, N, 1, 1),
        state.reshape(B * H, K, V),
    )
    o = (q * from_start.transpose(1, 2)) @ states.view(B * H * N, K, V)
    o = torch.baddbmm(o, q @ kT * decay, writes.view(B * H * N, C, V))
    return o.view(B, H, N * C, V)[:, :, :T], state.view(B, H, K, V)


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

    A (M,N,C,V), W and E (M,N,C,K), d (M,N,1,1), S_0 (M,K,V) -> U (M,N,C,V), the S_n before each chunk (M,N,K,V), S_N.
    """

    @staticmethod
    def forward(ctx, A, W, E, d, S):  # type: ignore[no-untyped-def]
        U, states = torch.empty_like(A), A.new_empty(*A.shape[:2], *S.shape[1:])
        for n in range(A.shape[1]):
            states[:, n] = S
            U[:, n] = torch.baddbmm(A[:, n], W[:, n], S, alpha=-1)
            S = torch.baddbmm(d[:, n] * S, E[:, n].transpose(1, 2), U[:, n])
        ctx.save_for_backward(W, E, d, U, states)
        return U, states, S

    @staticmethod
    def backward(ctx, dU, dstates, dS):  # type: ignore[no-untyped-def]
        W, E, d, U, states = ctx.saved_tensors
        dA, after = torch.empty_like(U), torch.empty_like(states)  # `after`: the gradient of S_(n+1)
        for n in reversed(range(U.shape[1])):
            after[:, n] = dS
            dA[:, n] = torch.baddbmm(dU[:, n], E[:, n], dS)
            dS = torch.baddbmm(dstates[:, n] + d[:, n] * dS, W[:, n].transpose(1, 2), dA[:, n], alpha=-1)
        dW = -(dA @ states.transpose(-1, -2))
        dE = U @ after.transpose(-1, -2)
        dd = (states * after).sum((-1, -2), keepdim=True)
        return dA, dW, dE, dd, dS
