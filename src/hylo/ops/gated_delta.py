"""The gated delta rule of Gated DeltaNet (Yang et al., arXiv 2412.06464), equation 10.

    S_t = exp(g_t) S_(t-1),   S_t <- S_t + k_t (beta_t (v_t - S_t^T k_t))^T,   o_t = scale S_t^T q_t

`gated_delta_rule` runs chunk by chunk (arXiv 2406.06484, section 3.2, with decay): with S the state before a chunk, G
its running log decay, D_ij = exp(G_i - G_j) for i >= j, and A = tril(beta (K K^T) D, -1), a chunk's writes U, outputs O
and the state after it are

    U = (I + A)^-1 beta (V - exp(G) K S),   O = exp(G) Q S + (Q K^T D) U,   exp(G_C) S + (exp(G_C - G) K)^T U

Its gradient is written out below, since autograd would keep every product of every chunk: kept are U, the inverses and
the states. Packed documents are cut into chunks each by itself, and a step takes all documents that have another chunk.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hylo.ops.checks import check_multiple, check_sequences, check_tensors, without_autocast
from hylo.ops.chunks import (
    Chunks,
    Segment,
    StateScan,
    decay_gradient,
    decays,
    kept_chunks,
    make_chunks,
    unit_lower_inverse,
)
from hylo.ops.kernels import fla_kernel

CHUNK = 64
FEW = 2  # chunks in a sequence: where there are no more, what states of zero would add is left out


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
    The core runs in float32, or in float64 where v is float64. Raises ValueError for tensors or bounds that do not fit.
    """
    sizes = check_tensors(
        "gated_delta_rule",
        q=(q, "B T Hk K"),
        k=(k, "B T Hk K"),
        v=(v, "B T Hv V"),
        g=(g, "B T Hv"),
        beta=(beta, "B T Hv"),
        initial_state=(initial_state, "N Hv K V"),
    )
    check_multiple("gated_delta_rule", sizes, "Hv", "Hk")
    sequences = check_sequences("gated_delta_rule", v, initial_state, cu_seqlens)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    with without_autocast(v):
        decoding = v.shape[1] == 1 and cu_seqlens is None
        recurrent = decoding and not torch.is_grad_enabled()  # flash-linear-attention's has no gradient
        if kernel := fla_kernel("fused_recurrent_gated_delta_rule" if recurrent else "chunk_gated_delta_rule", v):
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
        from_zero = initial_state is None
        if initial_state is None:
            initial_state = torch.zeros(sequences, v.shape[2], k.shape[3], v.shape[3], dtype=core, device=v.device)
        initial_state = initial_state.to(core)
        if decoding:
            o, state = _step(q, k, v, g, beta, initial_state, scale, use_qk_l2norm)
        else:
            tensors = (q, k, v, g, beta, initial_state)
            keeping = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
            o, state, *_ = _chunked(*tensors, scale, use_qk_l2norm, cu_seqlens, keeping, from_zero, output_final_state)
    return o, state if output_final_state else None


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
    scale = k.shape[-1] ** -0.5 if scale is None else scale
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
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, use_qk_l2norm: bool
) -> tuple[Tensor, ...]:
    """Core type, scaled queries, as many q/k heads as value heads."""
    core = torch.float64 if v.dtype == torch.float64 else torch.float32
    q, k, v, g, beta = (t.to(core) for t in (q, k, v, g, beta))
    if use_qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    q = q * scale
    if (repeats := v.shape[2] // k.shape[2]) > 1:
        q, k = q.repeat_interleave(repeats, 2), k.repeat_interleave(repeats, 2)
    return q, k, v, g, beta


def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float, use_qk_l2norm: bool
) -> tuple[Tensor, Tensor]:
    """One token: (B,1,H,.) and the state (B,H,K,V), which is read twice and written twice, whatever is asked of it."""
    (B, H, K, V), core = state.shape, state.dtype
    kq = torch.stack((k[:, 0], q[:, 0]), dim=2).to(core)
    if use_qk_l2norm:
        kq = l2norm(kq)
    if H != kq.shape[1]:
        kq = kq.repeat_interleave(H // kq.shape[1], 1)
    kq = kq.flatten(0, 1)  # (B*H,2,K)
    k, q = kq[:, :1], kq[:, 1:]
    decay, state = g.to(core).exp().reshape(-1, 1, 1), state.flatten(0, 1)
    read = torch.bmm(kq, state) * decay
    write = (v.to(core).reshape(-1, 1, V) - read[:, :1]) * beta.to(core).reshape(-1, 1, 1)
    o = torch.addcmul(read[:, 1:], (k * q).sum(-1, keepdim=True), write) * scale
    state = (state * decay).addcmul_(k.transpose(1, 2), write)
    return o.view(B, 1, H, V).to(v.dtype), state.view(B, H, K, V)


class _Inside(NamedTuple):
    """What a segment's chunks need beside the state; M = chunks * heads matrices of C rows."""

    kq: Tensor  # (M,2C,K) keys above queries, normalised and scaled,
    inverse_norm: Tensor  # (M,2C,1) and by what
    v: Tensor  # (M,C,V)
    beta: Tensor  # (M,C,1)
    products: Tensor  # (M,2C,C) K K^T above Q K^T
    between: Tensor  # (M,C,C) D
    to_end: Tensor  # (M,C,1) exp(G_C - G)
    reading: Tensor  # (M,2C,1) -beta exp(G) for keys, exp(G) for queries
    whole: Tensor  # (M,1,1) exp(G_C)

    @property
    def system(self) -> Tensor:
        """A, whose upper triangle nobody reads."""
        return self.products[:, : self.between.shape[1]] * self.between * self.beta

    @property
    def attention(self) -> Tensor:
        """Q K^T D."""
        return self.products[:, self.between.shape[1] :] * self.between


@torch.library.custom_op("hylo::gated_delta_rule", mutates_args=())
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
    from_zero: bool,
    leaves_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o and the last states, and for the gradient, where it is wanted, U, the inverses and the states before chunks.

    from_zero: the states are zeros that no gradient is asked of; leaves_state: the last states will be looked at.
    An operation of its own to torch.compile, which would otherwise unroll the loops.
    """
    chunks = make_chunks(v, cu_seqlens, CHUNK)
    few = len(chunks.steps) <= FEW
    core, C, H, (K, V) = state.dtype, chunks.length, v.shape[2], state.shape[2:]
    M = sum(chunks.steps) * H if keeping else 0
    writes, inverses = (v.new_empty(M, *shape, dtype=core) for shape in ((C, V), (C, C)))
    states = v.new_zeros(M, K, V, dtype=core)  # untouched, zeros take no memory
    last = torch.zeros_like(state) if from_zero else chunks.ordered(state)
    last = last.flatten(0, 1)
    scan = StateScan(last, [n * H for n in chunks.steps], states if keeping else None, from_zero)
    o = torch.empty_like(v)
    for segment in chunks.segments(_chunk_bytes(C, H, K, V, core), v.device):
        inside = _inside(q, k, v, g, beta, scale, use_qk_l2norm, chunks, segment, core)
        inverse = unit_lower_inverse(inside.system)
        read_k, read_q = (inside.kq * inside.reading).split(C, dim=1)
        writing_k = (inside.kq[:, :C] * inside.to_end).transpose(1, 2)
        R, here = inside.v * inside.beta, slice(segment.start * H, segment.stop * H)
        U, o_segment = writes[here] if keeping else torch.empty_like(R), torch.empty_like(R)
        if keeping:
            inverses[here] = inverse
        stop = 0
        for step, sequences in enumerate(segment.steps, start=segment.first_step):
            start, stop = stop, stop + sequences * H
            now, S = slice(start, stop), scan.before()
            if step or not (few and from_zero):
                R[now].baddbmm_(read_k[now], S)
                torch.bmm(read_q[now], S, out=o_segment[now])
            else:
                o_segment[now] = 0
            torch.bmm(inverse[now], R[now], out=U[now])
            if step + 1 < len(chunks.steps) or not few or leaves_state:
                scan.after(inside.whole[now]).baddbmm_(writing_k[now], U[now])
        o_segment.baddbmm_(inside.attention, U)
        chunks.scatter(o_segment.unflatten(0, (-1, H)), segment, o)
    return o, chunks.restored(last.view(-1, H, K, V)), writes, inverses, states


@torch.library.custom_op("hylo::gated_delta_rule_backward", mutates_args=())
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
    from_zero: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, g, beta and the states."""
    chunks = make_chunks(v, cu_seqlens, CHUNK)
    core, C, H, (K, V) = writes.dtype, chunks.length, v.shape[2], all_states.shape[1:]
    gradients = [torch.empty_like(t) for t in (q, k, v, g, beta)]
    few, left_state = len(chunks.steps) <= FEW, grad_last is not None
    sequences = len(v) if cu_seqlens is None else len(cu_seqlens) - 1
    dS_all = writes.new_zeros(sequences, H, K, V) if grad_last is None else chunks.ordered(grad_last)
    dS_all = dS_all.flatten(0, 1)
    for segment in reversed(list(chunks.segments(_chunk_bytes(C, H, K, V, core), v.device))):
        here = slice(segment.start * H, segment.stop * H)
        U, inverse, states = writes[here], inverses[here], all_states[here]
        inside = _inside(q, k, v, g, beta, scale, use_qk_l2norm, chunks, segment, core)
        do = chunks.gather(grad_o, segment, core).flatten(0, 1)
        reading_T = (inside.kq * inside.reading).transpose(1, 2)
        writing = inside.kq[:, :C] * inside.to_end
        dU, dR = torch.bmm(inside.attention.transpose(1, 2), do), torch.empty_like(do)
        d_writing, d_whole = torch.empty_like(writing), torch.empty_like(inside.whole)
        stop = len(do)
        for step in range(segment.first_step + len(segment.steps) - 1, segment.first_step - 1, -1):
            start, stop = stop - chunks.steps[step] * H, stop
            now, dS = slice(start, stop), dS_all[: stop - start]
            if step + 1 < len(chunks.steps) or not few or left_state:
                dU[now].baddbmm_(writing[now], dS)
                torch.bmm(U[now], dS.transpose(1, 2), out=d_writing[now])
                torch.bmm(states[now].flatten(1)[:, None], dS.flatten(1)[..., None], out=d_whole[now])
            else:
                d_writing[now], d_whole[now] = 0, 0
            torch.bmm(inverse[now].transpose(1, 2), dU[now], out=dR[now])
            if step or not (few and from_zero):
                dS.mul_(inside.whole[now]).baddbmm_(reading_T[now, :, :C], dR[now])
                dS.baddbmm_(reading_T[now, :, C:], do[now])
            stop = start
        del reading_T, writing, dU
        first = chunks.steps[0] * H if few and from_zero and segment.first_step == 0 else 0
        parts = _inside_gradients(inside, U, states, do, dR, d_writing, d_whole, first, scale, use_qk_l2norm)
        for gradient, part in zip(gradients, parts, strict=True):
            part = part.unflatten(0, (-1, H))
            if gradient.shape[2] != H:  # heads that share queries and keys
                part = part.unflatten(1, (gradient.shape[2], -1)).sum(2)
            chunks.scatter(part, segment, gradient)
    dq, dk, dv, dg, dbeta = gradients
    return dq, dk, dv, dg, dbeta, chunks.restored(dS_all.view(-1, H, K, V))


@_chunked.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    _, _, v, _, _, state, _, _, cu_seqlens, keeping, *_ = inputs
    (M, C), (K, V) = kept_chunks(v, cu_seqlens, CHUNK, keeping), state.shape[2:]
    kept = [state.new_empty(M * v.shape[2], *shape) for shape in ((C, V), (C, C), (K, V))]
    return torch.empty_like(v), torch.empty_like(state), *kept


@_chunked_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    _, _, q, k, v, g, beta, _, _, states, _, _, cu_seqlens, _ = inputs
    sequences = len(v) if cu_seqlens is None else len(cu_seqlens) - 1
    state = states.new_empty(sequences, v.shape[2], *states.shape[1:])
    return *(torch.empty_like(t) for t in (q, k, v, g, beta)), state


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, scale, use_qk_l2norm, cu_seqlens, _, from_zero, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:], cu_seqlens)
    ctx.options = scale, use_qk_l2norm, from_zero
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, grad_o: Tensor | None, grad_last: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens = ctx.saved_tensors
    grad_o = torch.zeros_like(tensors[2]) if grad_o is None else grad_o
    scale, use_qk_l2norm, from_zero = ctx.options
    gradients = _chunked_backward(grad_o, grad_last, *tensors, scale, use_qk_l2norm, cu_seqlens, from_zero)
    return *gradients, None, None, None, None, None, None


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
) -> _Inside:
    repeats = v.shape[2] // k.shape[2]
    kq = torch.cat([chunks.gather(t, segment, core) for t in (k, q)], dim=2)
    if repeats > 1:
        kq = kq.repeat_interleave(repeats, 1)
    kq = kq.flatten(0, 1)
    v, g, beta = (chunks.gather(t, segment, core).flatten(0, 1) for t in (v, g, beta))
    C = g.shape[1]
    inverse_norm = kq.new_ones(len(kq), 2 * C, 1)
    if use_qk_l2norm:
        inverse_norm = torch.rsqrt((kq * kq).sum(-1, keepdim=True) + 1e-6)
    inverse_norm[:, C:] *= scale
    kq *= inverse_norm
    from_start, to_end, between = decays(g)
    beta = beta[..., None]
    reading = torch.cat((-beta[..., 0] * from_start, from_start), dim=1)[..., None]
    products = kq @ kq[:, :C].transpose(1, 2)
    return _Inside(kq, inverse_norm, v, beta, products, between, to_end[..., None], reading, from_start[:, -1:, None])


def _inside_gradients(
    inside: _Inside,
    U: Tensor,
    states: Tensor,
    do: Tensor,
    dR: Tensor,
    d_writing: Tensor,
    d_whole: Tensor,
    first: int,
    scale: float,
    use_qk_l2norm: bool,
) -> tuple[Tensor, ...]:
    """The gradients of q, k (M,C,K), v (M,C,V), g and beta (M,C), from what the loop over the states left.

    The `first` of the M had a state of zero.
    """
    kq, beta, between, C = inside.kq, inside.beta, inside.between, inside.beta.shape[1]
    d_both = torch.cat((dR, do), dim=1)
    d_read = torch.zeros_like(kq)  # of reading * kq
    torch.bmm(d_both[first:], states[first:].transpose(1, 2), out=d_read[first:])
    d_products = d_both @ U.transpose(1, 2)
    del d_both
    d_system = d_products[:, :C].mul_(between).tril_(-1).neg_()  # before beta, after D
    d_products[:, C:].mul_(between)

    by_beta = (d_system * inside.products[:, :C]).sum(-1)
    d_system *= beta
    of_decay = (d_products * inside.products).view(-1, 2, C, C).sum(1)  # D_ij dD_ij
    read = (d_read * kq).sum(-1)
    written = (d_writing * kq[:, :C]).sum(-1) * inside.to_end[..., 0]
    reading = inside.reading[..., 0]

    d_kq = d_read.mul_(inside.reading).baddbmm_(d_products, kq[:, :C])
    d_keys = d_writing.mul_(inside.to_end).baddbmm_(d_products.transpose(1, 2), kq)
    d_kq[:, :C] += d_keys

    from_start = (reading * read).view(-1, 2, C).sum(1)
    dg = decay_gradient(from_start, written, of_decay, (d_whole * inside.whole)[:, 0, 0])
    d_beta = (dR * inside.v).sum(-1) - reading[:, C:] * read[:, :C] + by_beta

    if use_qk_l2norm:
        # With x/|x| times a scale: what of the gradient lies along x does not count.
        scales = kq.new_ones(2 * C, 1)
        scales[C:] = scale
        along = (d_kq * kq).sum(-1, keepdim=True) / scales**2
        d_kq = (d_kq - kq * along) * inside.inverse_norm
    else:
        d_kq = d_kq * inside.inverse_norm
    return d_kq[:, C:], d_kq[:, :C], dR * beta, dg, d_beta


def _chunk_bytes(C: int, H: int, K: int, V: int, core: torch.dtype) -> int:
    """Of the buffers that one chunk takes in a segment."""
    return H * C * (6 * K + 4 * V + 6 * C) * core.itemsize
