"""The Kimi delta rule (Kimi Team, arXiv 2510.26692), equation 1: the delta rule with a decay for each channel of a key.

    S_t = Diag(exp(g_t)) S_(t-1),   S_t <- S_t + k_t (beta_t (v_t - S_t^T k_t))^T,   o_t = scale S_t^T q_t

`kimi_delta_rule` runs chunk by chunk, as `gated_delta_rule` does. With S the state before a chunk, G (C,K) its running
log decay, A_ij = beta_i k_i^T Diag(exp(G_i - G_j)) k_j for i > j, and P_ij = q_i^T Diag(exp(G_i - G_j)) k_j for i >= j,

    U = (I + A)^-1 beta (V - (exp(G) K) S),   O = (exp(G) Q) S + P U,   Diag(exp(G_C)) S + (exp(G_C - G) K)^T U

Decays differ by channel, so that A and P are no products of matrices times some of decays, and exp(-G) would overflow.
They are built by doubling (`_inside`): in a block of 2h tokens, the rows of its second half meet the columns of its
first, both decayed to the border between them. All factors are decays, at most one; no logarithms are subtracted, and
nothing is masked. After the last doubling rows and columns are exp(G) q, exp(G) k and exp(G_C - G) k.

The gradient is written out below and goes the same steps back: kept are U, the inverses and the states before chunks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hylo.ops.checks import check_sequences, check_tensors, without_autocast
from hylo.ops.chunks import Chunks, Segment, StateScan, kept_chunks, make_chunks, unit_lower_inverse
from hylo.ops.gated_delta import l2norm
from hylo.ops.kernels import fla_kernel

CHUNK = 64  # a power of two
FLA_WIDEST = 256  # key channels that flash-linear-attention's kernels take


def kimi_delta_rule(
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
    """q, k, g (B,T,H,K), g the log decay, <= 0; v (B,T,H,V); beta (B,T,H); state (N,H,K,V).

    scale: K**-0.5 if None. cu_seqlens (N+1): B = 1 row packs N documents with these bounds, each with a state of its
    own (0 <= ... <= T, on the CPU if it can be; empty documents keep their state); None: N = B rows.
    Returns o (B,T,H,V) in v's type and the last states or None.
    The core runs in float32, or in float64 where v is float64. Raises ValueError for tensors or bounds that do not fit.
    """
    check_tensors(
        "kimi_delta_rule",
        q=(q, "B T H K"),
        k=(k, "B T H K"),
        v=(v, "B T H V"),
        g=(g, "B T H K"),
        beta=(beta, "B T H"),
        initial_state=(initial_state, "N H K V"),
    )
    sequences = check_sequences("kimi_delta_rule", v, initial_state, cu_seqlens)
    K = k.shape[-1]
    scale = K**-0.5 if scale is None else scale
    with without_autocast(v):
        decoding = v.shape[1] == 1 and cu_seqlens is None
        recurrent = decoding and not torch.is_grad_enabled()  # flash-linear-attention's has no gradient
        name = "fused_recurrent_kda" if recurrent else "chunk_kda"
        if K <= FLA_WIDEST and (kernel := fla_kernel(name, v)):
            return kernel(
                q=q.to(v.dtype),
                k=k.to(v.dtype),
                v=v,
                g=g.float(),
                beta=beta.float(),
                scale=scale,
                initial_state=None if initial_state is None else initial_state.float(),
                output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm,
                cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(v.device, torch.long),
            )
        core = torch.float64 if v.dtype == torch.float64 else torch.float32
        if initial_state is None:
            initial_state = torch.zeros(sequences, v.shape[2], K, v.shape[3], dtype=core, device=v.device)
        initial_state = initial_state.to(core)
        if decoding:
            o, state = _step(q, k, v, g, beta, initial_state, scale, use_qk_l2norm)
        else:
            tensors = (q, k, v, g, beta, initial_state)
            keeping = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
            o, state, *_ = _chunked(*tensors, scale, use_qk_l2norm, cu_seqlens, keeping)
    return o, state if output_final_state else None


def naive_kimi_delta_rule(
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
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    core = torch.float64 if v.dtype == torch.float64 else torch.float32
    q_, k_, v_, g_, beta_ = (t.to(core) for t in (q, k, v, g, beta))
    if use_qk_l2norm:
        q_, k_ = l2norm(q_), l2norm(k_)
    bounds = [0, v.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    if initial_state is None:
        initial_state = v_.new_zeros(len(v) * (len(bounds) - 1), v.shape[2], k.shape[3], v.shape[3])
    outputs, states = [], []
    for start, end, state in zip(bounds[:-1], bounds[1:], initial_state.to(core).split(len(v)), strict=True):
        for t in range(start, end):
            state = state * g_[:, t, :, :, None].exp()
            read = torch.einsum("bhkv,bhk->bhv", state, k_[:, t])
            write = beta_[:, t, :, None] * (v_[:, t] - read)
            state = state + torch.einsum("bhk,bhv->bhkv", k_[:, t], write)
            outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q_[:, t]))
        states.append(state)
    return torch.stack(outputs, dim=1).to(v.dtype), torch.cat(states) if output_final_state else None


def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float, use_qk_l2norm: bool
) -> tuple[Tensor, Tensor]:
    """One token: (B,1,H,.) and the state (B,H,K,V), which is read twice and written twice."""
    (B, H, K, V), core = state.shape, state.dtype
    kq = torch.stack((k[:, 0], q[:, 0]), dim=2).to(core)
    if use_qk_l2norm:
        kq = l2norm(kq)
    kq = kq.flatten(0, 1)  # (B*H,2,K)
    k, q = kq[:, :1], kq[:, 1:]
    decay, state = g.to(core).exp().reshape(-1, 1, K), state.flatten(0, 1)
    read = torch.bmm(kq * decay, state)
    write = (v.to(core).reshape(-1, 1, V) - read[:, :1]) * beta.to(core).reshape(-1, 1, 1)
    o = torch.addcmul(read[:, 1:], (k * q).sum(-1, keepdim=True), write) * scale
    state = (state * decay.transpose(1, 2)).addcmul_(k.transpose(1, 2), write)
    return o.view(B, 1, H, V).to(v.dtype), state.view(B, H, K, V)


class _Level(NamedTuple):
    """What one doubling, from blocks of h tokens to M * C / 2h of twice as many, multiplied."""

    rows: Tensor  # (M*C/2h,2h,K) keys and queries of second halves, decayed since the border,
    columns: Tensor  # (M*C/2h,h,K) keys of first halves, decayed up to it,
    halves: Tensor  # (M*C/2h,2,K) and what each half decays by


class _Inside(NamedTuple):
    """What a segment's chunks need beside the state; M = chunks * heads, keys and queries in turn."""

    kq: Tensor  # (M,C,2,K) normalised and scaled,
    inverse_norm: Tensor  # (M,C,2,1) and by what
    v: Tensor  # (M,C,V)
    beta: Tensor  # (M,C,1)
    decay: Tensor  # (M,C,K) exp(g)
    products: Tensor  # (M,C,2,C) A before beta, and P
    reading: Tensor  # (M,C,2,K) exp(G) kq
    writing: Tensor  # (M,C,K) exp(G_C - G) k
    whole: Tensor  # (M,K,1) exp(G_C)
    levels: list[_Level]  # where a gradient is wanted, the smallest blocks first

    @property
    def system(self) -> Tensor:
        """A."""
        return self.products[:, :, 0] * self.beta

    @property
    def attention(self) -> Tensor:
        """P."""
        return self.products[:, :, 1]


@torch.library.custom_op("hylo::kimi_delta_rule", mutates_args=())
def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    use_qk_l2norm: bool,
    cu_seqlens: Tensor | None,
    keeping: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o and the last states, and for the gradient, where it is wanted, U, the inverses and the states before chunks.

    An operation of its own to torch.compile, which would otherwise unroll the loops.
    """
    chunks = make_chunks(v, cu_seqlens, CHUNK, doubling=True)
    core, C, H, (K, V) = state.dtype, chunks.length, v.shape[2], state.shape[2:]
    M = sum(chunks.steps) * H if keeping else 0
    writes, inverses = (v.new_empty(M, *shape, dtype=core) for shape in ((C, V), (C, C)))
    states = v.new_zeros(M, K, V, dtype=core)  # untouched, zeros take no memory
    last = chunks.ordered(state).flatten(0, 1)
    scan = StateScan(last, [n * H for n in chunks.steps], states if keeping else None)
    o = torch.empty_like(v)
    for segment in chunks.segments(_chunk_bytes(C, H, K, V, core), v.device):
        inside = _inside(q, k, v, g, beta, scale, use_qk_l2norm, chunks, segment, core, keeping=False)
        inverse = unit_lower_inverse(inside.system)
        read_k, read_q = inside.reading[:, :, 0] * -inside.beta, inside.reading[:, :, 1]
        writing, here = inside.writing.transpose(1, 2), slice(segment.start * H, segment.stop * H)
        R = inside.v * inside.beta
        U, o_segment = writes[here] if keeping else torch.empty_like(R), torch.empty_like(R)
        if keeping:
            inverses[here] = inverse
        stop = 0
        for sequences in segment.steps:
            start, stop = stop, stop + sequences * H
            now, S = slice(start, stop), scan.before()
            R[now].baddbmm_(read_k[now], S)
            torch.bmm(read_q[now], S, out=o_segment[now])
            torch.bmm(inverse[now], R[now], out=U[now])
            scan.after(inside.whole[now]).baddbmm_(writing[now], U[now])
        o_segment.baddbmm_(inside.attention, U)
        chunks.scatter(o_segment.unflatten(0, (-1, H)), segment, o)
    return o, chunks.restored(last.view(-1, H, K, V)), writes, inverses, states


@torch.library.custom_op("hylo::kimi_delta_rule_backward", mutates_args=())
def _chunked_backward(
    grad_o: Tensor,
    grad_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    writes: Tensor,
    inverses: Tensor,
    all_states: Tensor,
    scale: float,
    use_qk_l2norm: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, g, beta and the states."""
    chunks = make_chunks(v, cu_seqlens, CHUNK, doubling=True)
    core, C, H, (K, V) = writes.dtype, chunks.length, v.shape[2], all_states.shape[1:]
    gradients = [torch.empty_like(t) for t in (q, k, v, g, beta)]
    sequences = len(v) if cu_seqlens is None else len(cu_seqlens) - 1
    dS_all = writes.new_zeros(sequences, H, K, V) if grad_last is None else chunks.ordered(grad_last)
    dS_all = dS_all.flatten(0, 1)
    for segment in reversed(list(chunks.segments(_chunk_bytes(C, H, K, V, core), v.device))):
        here = slice(segment.start * H, segment.stop * H)
        U, inverse, states = writes[here], inverses[here], all_states[here]
        inside = _inside(q, k, v, g, beta, scale, use_qk_l2norm, chunks, segment, core, keeping=True)
        do = chunks.gather(grad_o, segment, core).flatten(0, 1)
        read_k = (inside.reading[:, :, 0] * -inside.beta).transpose(1, 2)
        read_q = inside.reading[:, :, 1].transpose(1, 2)
        dU, dR = torch.bmm(inside.attention.transpose(1, 2), do), torch.empty_like(do)
        d_writing, d_whole = torch.empty_like(inside.writing), torch.empty_like(inside.whole)
        stop = len(do)
        for step in range(segment.first_step + len(segment.steps) - 1, segment.first_step - 1, -1):
            start, stop = stop - chunks.steps[step] * H, stop
            now, dS = slice(start, stop), dS_all[: stop - start]
            dU[now].baddbmm_(inside.writing[now], dS)
            torch.bmm(U[now], dS.transpose(1, 2), out=d_writing[now])
            torch.sum(states[now] * dS, 2, keepdim=True, out=d_whole[now])
            torch.bmm(inverse[now].transpose(1, 2), dU[now], out=dR[now])
            dS.mul_(inside.whole[now]).baddbmm_(read_k[now], dR[now]).baddbmm_(read_q[now], do[now])
            stop = start
        d_reading = torch.stack([torch.bmm(d, states.transpose(1, 2)) for d in (dR, do)], dim=2)
        parts = _inside_gradients(inside, U, do, dR, d_reading, d_writing, d_whole, scale, use_qk_l2norm)
        for gradient, part in zip(gradients, parts, strict=True):
            chunks.scatter(part.unflatten(0, (-1, H)), segment, gradient)
    dq, dk, dv, dg, dbeta = gradients
    return dq, dk, dv, dg, dbeta, chunks.restored(dS_all.view(-1, H, K, V))


@_chunked.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    _, _, v, _, _, state, _, _, cu_seqlens, keeping = inputs
    (M, C), (K, V) = kept_chunks(v, cu_seqlens, CHUNK, keeping, doubling=True), state.shape[2:]
    kept = [state.new_empty(M * v.shape[2], *shape) for shape in ((C, V), (C, C), (K, V))]
    return torch.empty_like(v), torch.empty_like(state), *kept


@_chunked_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    _, _, q, k, v, g, beta, _, _, states, _, _, cu_seqlens = inputs
    sequences = len(v) if cu_seqlens is None else len(cu_seqlens) - 1
    state = states.new_empty(sequences, v.shape[2], *states.shape[1:])
    return *(torch.empty_like(t) for t in (q, k, v, g, beta)), state


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, scale, use_qk_l2norm, cu_seqlens, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:], cu_seqlens)
    ctx.options = scale, use_qk_l2norm
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, grad_o: Tensor | None, grad_last: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens = ctx.saved_tensors
    grad_o = torch.zeros_like(tensors[2]) if grad_o is None else grad_o
    gradients = _chunked_backward(grad_o, grad_last, *tensors, *ctx.options, cu_seqlens)
    return *gradients, None, None, None, None


_chunked.register_autograd(_backward, setup_context=_keep)


def _inside(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    use_qk_l2norm: bool,
    chunks: Chunks,
    segment: Segment,
    core: torch.dtype,
    keeping: bool,
) -> _Inside:
    kq = torch.stack([chunks.gather(t, segment, core).flatten(0, 1) for t in (k, q)], dim=2)
    v, g, beta = (chunks.gather(t, segment, core).flatten(0, 1) for t in (v, g, beta))
    M, C, _, K = kq.shape
    inverse_norm = kq.new_ones(M, C, 2, 1)
    if use_qk_l2norm:
        inverse_norm = torch.rsqrt((kq * kq).sum(-1, keepdim=True) + 1e-6)
    inverse_norm[:, :, 1] *= scale
    kq *= inverse_norm

    # From blocks of one token to the whole chunk: rows know the decay since their block began, columns up to its end.
    decay = g.exp_()
    rows, columns, whole, levels, h = kq * decay[:, :, None], kq[:, :, 0].contiguous(), decay, [], 1
    products = kq.new_zeros(M, C, 2, C)
    products[:, :, 1].diagonal(dim1=1, dim2=2).copy_((kq[:, :, 0] * kq[:, :, 1]).sum(-1))
    while h < C:
        level = _Level(rows.view(-1, 2, 2 * h, K)[:, 1], columns.view(-1, 2, h, K)[:, 0], whole.view(-1, 2, K))
        product = torch.bmm(level.rows, level.columns.transpose(1, 2))
        _meetings(products, h).copy_(product.view(M, -1, h, 2, h))
        if keeping:
            levels.append(level._replace(rows=level.rows.clone(), columns=level.columns.clone()))
        level.rows.mul_(level.halves[:, :1])
        level.columns.mul_(level.halves[:, 1:])
        whole, h = level.halves[:, 0] * level.halves[:, 1], 2 * h
    return _Inside(kq, inverse_norm, v, beta[..., None], decay, products, rows, columns, whole.view(M, K, 1), levels)


def _inside_gradients(
    inside: _Inside,
    U: Tensor,
    do: Tensor,
    dR: Tensor,
    d_reading: Tensor,
    d_writing: Tensor,
    d_whole: Tensor,
    scale: float,
    use_qk_l2norm: bool,
) -> tuple[Tensor, ...]:
    """The gradients of q, k (M,C,K), v (M,C,V), g (M,C,K) and beta (M,C), from what the loop over the states left."""
    kq, beta, (M, C, _, K) = inside.kq, inside.beta, inside.kq.shape
    d_system = torch.bmm(dR, U.transpose(1, 2)).neg_()
    of_keys = d_reading[:, :, 0]  # still without -beta
    read = (of_keys * inside.reading[:, :, 0]).sum(-1)
    d_beta = (dR * inside.v).sum(-1) - read + (d_system * inside.products[:, :, 0]).sum(-1)
    of_keys.mul_(-beta)
    d_products = torch.stack((d_system.mul_(beta), torch.bmm(do, U.transpose(1, 2))), dim=2)

    # Down again: each half's decay had a share in its neighbour's rows or columns, and in the whole block's decay.
    d_rows, d_columns, d_decay, h = d_reading, d_writing, d_whole.view(M, 1, K), C // 2
    for rows, columns, halves in reversed(inside.levels):
        met = _meetings(d_products, h).reshape(-1, 2 * h, h)
        of_rows, of_columns = d_rows.view(-1, 2, 2 * h, K)[:, 1], d_columns.view(-1, 2, h, K)[:, 0]
        first = (of_rows * rows).sum(1, keepdim=True)
        second = (of_columns * columns).sum(1, keepdim=True)
        d_decay = d_decay.reshape(-1, 1, K) * halves.flip(1) + torch.cat((first, second), dim=1)
        of_rows.mul_(halves[:, :1]).add_(torch.bmm(met, columns))
        of_columns.mul_(halves[:, 1:]).add_(torch.bmm(met.transpose(1, 2), rows))
        h //= 2
    dg = (d_decay.view(M, C, K) + (d_rows * kq).sum(2)) * inside.decay
    own = d_products[:, :, 1].diagonal(dim1=1, dim2=2)[..., None, None]  # of q_i k_i, which nothing decays
    d_kq = (d_rows * inside.decay[:, :, None]).addcmul_(own, kq.flip(2))
    d_kq[:, :, 0] += d_columns

    if use_qk_l2norm:
        # With x/|x| times a scale: what of the gradient lies along x does not count.
        scales = kq.new_tensor([1.0, scale])[:, None]
        d_kq -= kq * ((d_kq * kq).sum(-1, keepdim=True) / scales**2)
    d_kq *= inside.inverse_norm
    return d_kq[:, :, 1], d_kq[:, :, 0], dR * beta, dg, d_beta


def _meetings(products: Tensor, h: int) -> Tensor:
    """(M,C/2h,h,2,h), a view of (M,C,2,C): in each block of 2h tokens, second half's rows and first half's columns."""
    M, C = products.shape[:2]
    blocks = products.view(M, C // (2 * h), 2, h, 2, C // (2 * h), 2, h)[:, :, 1, :, :, :, 0]
    return blocks.diagonal(dim1=1, dim2=4).movedim(-1, 1)


def _chunk_bytes(C: int, H: int, K: int, V: int, core: torch.dtype) -> int:
    """Of the buffers that one chunk takes in a segment."""
    return H * C * (10 * K + 4 * V + 5 * C) * core.itemsize
