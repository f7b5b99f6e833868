"""The state-space recurrence of Mamba-2 (Dao and Gu, arXiv 2405.21060), with grouped x and B as the recipe has them.

    h_t = exp(-exp(A_log) dt_t) h_(t-1) + dt_t x_t B_t^T,   y_t = h_t C_t + D x_t,   dt = softplus(dt + dt_bias)

`ssd` runs chunk by chunk (section 6 of the paper): with h the state before a chunk, G its running log decay and
D_ij = exp(G_i - G_j) for i >= j,

    Y = (C B^T D dt_j) X + exp(G) C h^T,   h <- exp(G_L) h + (exp(G_L - G) dt X)^T B

The R heads of a group are rows of one product, so x and B are never repeated. The gradient is written out below: kept
are the states before each chunk, nothing else. Packed documents are cut into chunks each by itself, and a step takes
all documents that have another chunk.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hylo.ops.checks import check_multiple, check_sequences, check_tensors, without_autocast
from hylo.ops.chunks import Chunks, Segment, StateScan, decay_gradient, decays, kept_chunks, make_chunks
from hylo.ops.kernels import fla_kernel

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
    float64. Raises ValueError for tensors or bounds that do not fit.
    """
    sizes = check_tensors(
        "ssd",
        x=(x, "B T G P"),
        dt=(dt, "B T H"),
        A_log=(A_log, "H"),
        B=(B, "B T G N"),
        C=(C, "B T H N"),
        D=(D, "H"),
        dt_bias=(dt_bias, "H"),
        initial_state=(initial_state, "sequences H P N"),
    )
    check_multiple("ssd", sizes, "H", "G")
    sequences = check_sequences("ssd", x, initial_state, cu_seqlens)
    with without_autocast(x):
        core = torch.float64 if x.dtype == torch.float64 else torch.float32
        dt, g = _rates(dt, A_log, dt_bias, core)
        decoding = x.shape[1] == 1 and cu_seqlens is None
        if kernel := fla_kernel("fused_recurrent_simple_gla" if decoding else "chunk_simple_gla", x):
            return _through_fla(kernel, x, dt, g, B, C, D, initial_state, output_final_state, cu_seqlens)
        if initial_state is None:
            initial_state = torch.zeros(sequences, *C.shape[2:3], *x.shape[3:], B.shape[3], dtype=core, device=x.device)
        initial_state = initial_state.to(core)
        if decoding:
            y, state = _step(x, dt, g, B, C, D, initial_state)
        else:
            tensors = (x, dt, g, B, C, D, initial_state)
            keeping = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
            y, state, _ = _chunked(*tensors, cu_seqlens, keeping)
    return y, state if output_final_state else None


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
    core = torch.float64 if x.dtype == torch.float64 else torch.float32
    dt_, g = _rates(dt, A_log, dt_bias, core)
    x_, B_, C_ = (t.to(core) for t in (x, B, C))
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


def _rates(dt: Tensor, A_log: Tensor, dt_bias: Tensor | None, core: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positive dt, and g = -exp(A_log) dt, the log decay."""
    dt = F.softplus(dt.to(core) if dt_bias is None else dt.to(core) + dt_bias.to(core))
    return dt, -A_log.to(core).exp() * dt


def _step(
    x: Tensor, dt: Tensor, g: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: (B,1,G or H,.) and the state (B,H,P,N), which is read twice and written twice. The R heads of a group
    are rows of one product."""
    (batch, H, P, N), G, core = state.shape, x.shape[2], state.dtype
    R = H // G
    x_, B_, C_ = (t.to(core).reshape(batch, G, -1, t.shape[-1]) for t in (x, B, C))  # (B,G,1,P), (B,G,1,N), (B,G,R,N)
    decay, write = g.exp().reshape(batch * H, 1, 1), dt.reshape(batch, G, R, 1) * x_
    read = torch.bmm(state.flatten(0, 1), C_.reshape(-1, N, 1)) * decay
    y = torch.addcmul(read.view(batch, G, R, P), (B_ * C_).sum(-1, keepdim=True), write)
    if D is not None:
        y = torch.addcmul(y, D.to(core).view(G, R, 1), x_)
    state = (state.flatten(0, 1) * decay).view(batch, G, R * P, N)
    return y.view(batch, 1, H, P).to(x.dtype), state.addcmul_(write.view(batch, G, R * P, 1), B_).view(batch, H, P, N)


def _through_fla(
    kernel: Any,
    x: Tensor,
    dt: Tensor,
    g: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """As gated linear attention with queries C, keys B and values dt x, which knows no groups."""
    repeats = C.shape[2] // x.shape[2]
    x, B = x.repeat_interleave(repeats, 2), B.repeat_interleave(repeats, 2)
    y, state = kernel(
        q=C.to(x.dtype),
        k=B.to(x.dtype),
        v=(x * dt[..., None]).to(x.dtype),
        g=g,
        scale=1.0,
        initial_state=None if state is None else state.float(),
        output_final_state=output_final_state,
        state_v_first=True,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(x.device, torch.long),
    )
    return (y if D is None else y + (D[:, None] * x).to(y.dtype)), state


class _Inside(NamedTuple):
    """What a segment's chunks need beside the state: s chunks of L tokens, G groups of R heads."""

    x: Tensor  # (s*G,L,P)
    B: Tensor  # (s*G,L,N)
    C: Tensor  # (s*G,R*L,N)
    dt: Tensor  # (s,G,R,L)
    products: Tensor  # (s,G,R,L,L) C B^T
    between: Tensor  # (s,G,R,L,L) D
    from_start: Tensor  # (s,G,R,L) exp(G)
    to_end: Tensor  # (s,G,R,L) exp(G_L - G)

    @property
    def scores(self) -> Tensor:
        """C B^T D dt, (s*G,R*L,L)."""
        return (self.products * self.between).mul_(self.dt[..., None, :]).flatten(2, 3).flatten(0, 1)

    @property
    def reading(self) -> Tensor:
        """exp(G) C, (s*H,L,N)."""
        s, G, R, L = self.dt.shape
        return (self.C.view(s, G, R, L, -1) * self.from_start[..., None]).flatten(0, 2)

    @property
    def writing_T(self) -> Tensor:
        """(exp(G_L - G) dt X)^T, (s*G,R*P,L)."""
        s, G, R, L = self.dt.shape
        x_T = self.x.transpose(1, 2).view(s, G, 1, -1, L)
        return (x_T * (self.to_end * self.dt)[..., None, :]).flatten(2, 3).flatten(0, 1)

    @property
    def whole(self) -> Tensor:
        """exp(G_L), (s*H,1,1)."""
        return self.from_start[..., -1].reshape(-1, 1, 1)


@torch.library.custom_op("hylo::ssd", mutates_args=())
def _chunked(
    x: Tensor,
    dt: Tensor,
    g: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    keeping: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y and the last states, and for the gradient, where it is wanted, the states before chunks.

    An operation of its own to torch.compile, which would otherwise unroll the loops.
    """
    chunks = make_chunks(x, cu_seqlens, CHUNK)
    core, (G, H), (P, N) = state.dtype, (x.shape[2], C.shape[2]), state.shape[2:]
    last = chunks.ordered(state).flatten(0, 1)
    states = last.new_empty(sum(chunks.steps) * H if keeping else 0, P, N)
    scan = StateScan(last, [n * H for n in chunks.steps], states if keeping else None)
    y = x.new_empty(*C.shape[:3], P)
    for segment in chunks.segments(_chunk_bytes(chunks.length, G, H, P, N, core), x.device):
        inside = _inside(x, dt, g, B, C, chunks, segment, core)
        reading, writing_T, whole = inside.reading, inside.writing_T, inside.whole
        Y = torch.bmm(inside.scores, inside.x).view(-1, chunks.length, P)  # (s*H,L,P)
        stop = 0
        for sequences in segment.steps:
            start, stop = stop, stop + sequences
            heads, groups = slice(start * H, stop * H), slice(start * G, stop * G)
            Y[heads].baddbmm_(reading[heads], scan.before().transpose(1, 2))
            after = scan.after(whole[heads]).view(sequences * G, -1, N)
            after.baddbmm_(writing_T[groups], inside.B[groups])
        if D is not None:
            by_group = Y.view(*inside.dt.shape, P)
            by_group.addcmul_(D.to(core).view(G, -1, 1, 1), inside.x.view(-1, G, 1, chunks.length, P))
        chunks.scatter(Y.unflatten(0, (-1, H)), segment, y)
    return y, chunks.restored(last.view(-1, H, P, N)), states


@torch.library.custom_op("hylo::ssd_backward", mutates_args=())
def _chunked_backward(
    grad_y: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    dt: Tensor,
    g: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    kept: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, g, B, C, D (empty without one) and the states."""
    chunks = make_chunks(x, cu_seqlens, CHUNK)
    core, (G, H), (P, N), L = kept.dtype, (x.shape[2], C.shape[2]), kept.shape[1:], chunks.length
    gradients = [torch.empty_like(t) for t in (x, dt, g, B, C)]
    dD = kept.new_zeros(G, H // G)
    if grad_last is None:
        sequences = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
        grad_last = kept.new_zeros(sequences, H, P, N)
    dS_all = chunks.ordered(grad_last).flatten(0, 1)
    for segment in reversed(list(chunks.segments(_chunk_bytes(L, G, H, P, N, core), x.device))):
        inside, states = _inside(x, dt, g, B, C, chunks, segment, core), kept[segment.start * H : segment.stop * H]
        dY = chunks.gather(grad_y, segment, core).flatten(0, 1)  # (s*H,L,P)
        reading, writing_T, whole = inside.reading, inside.writing_T, inside.whole
        d_writing_T, d_whole, dB = (torch.empty_like(t) for t in (writing_T, whole, inside.B))
        stop = segment.stop - segment.start
        for sequences in reversed(segment.steps):
            start, stop = stop - sequences, stop
            heads, groups = slice(start * H, stop * H), slice(start * G, stop * G)
            dS = dS_all[: sequences * H]
            dS_groups = dS.view(sequences * G, -1, N)
            torch.bmm(dS_groups, inside.B[groups].transpose(1, 2), out=d_writing_T[groups])
            torch.bmm(writing_T[groups].transpose(1, 2), dS_groups, out=dB[groups])
            torch.bmm(states[heads].flatten(1)[:, None], dS.flatten(1)[..., None], out=d_whole[heads])
            dS.mul_(whole[heads]).baddbmm_(dY[heads].transpose(1, 2), reading[heads])
            stop = start
        d_reading = torch.bmm(dY, states)
        parts = _inside_gradients(inside, dY, d_reading, d_writing_T, dB, (d_whole * whole).view(-1, G, H // G))
        if D is not None:
            by_group = dY.view(*inside.dt.shape, P)
            dD += (by_group * inside.x.view(-1, G, 1, L, P)).sum((0, 3, 4))
            parts[0].add_((by_group * D.to(core).view(G, -1, 1, 1)).sum(2))
        for gradient, part in zip(gradients, parts, strict=True):
            chunks.scatter(part, segment, gradient)
    dx, ddt, dg, dB, dC = gradients
    d_skip = dD.flatten().to(D.dtype) if D is not None else dD.new_empty(0)
    return dx, ddt, dg, dB, dC, d_skip, chunks.restored(dS_all.view(-1, H, P, N))


@_chunked.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    x, _, _, _, C, _, state, cu_seqlens, keeping = inputs
    chunks, _ = kept_chunks(x, cu_seqlens, CHUNK, keeping)
    states = state.new_empty(chunks * C.shape[2], *state.shape[2:])
    return x.new_empty(*C.shape[:3], x.shape[3]), torch.empty_like(state), states


@_chunked_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    _, _, x, dt, g, B, C, D, states, cu_seqlens = inputs
    sequences = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
    dD = states.new_empty(0) if D is None else torch.empty_like(D)
    state = states.new_empty(sequences, C.shape[2], *states.shape[1:])
    return *(torch.empty_like(t) for t in (x, dt, g, B, C)), dD, state


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, cu_seqlens, _ = inputs
    ctx.save_for_backward(*tensors, output[2], cu_seqlens)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    x, dt, g, B, C, D, kept, cu_seqlens = ctx.saved_tensors
    if grad_y is None:
        grad_y = x.new_zeros(*C.shape[:3], x.shape[3])
    *gradients, dD, d_state = _chunked_backward(grad_y, grad_last, x, dt, g, B, C, D, kept, cu_seqlens)
    return *gradients, None if D is None else dD, d_state, None, None


_chunked.register_autograd(_backward, setup_context=_keep)


def _inside(
    x: Tensor, dt: Tensor, g: Tensor, B: Tensor, C: Tensor, chunks: Chunks, segment: Segment, core: torch.dtype
) -> _Inside:
    G, R, L = x.shape[2], C.shape[2] // x.shape[2], chunks.length
    x, B, C, dt, g = (chunks.gather(t, segment, core) for t in (x, B, C, dt, g))
    x, B, C = x.flatten(0, 1), B.flatten(0, 1), C.view(-1, R * L, C.shape[-1])
    from_start, to_end, between = decays(g.view(-1, G, R, L))
    products = torch.bmm(C, B.transpose(1, 2)).view(between.shape)
    return _Inside(x, B, C, dt.view(-1, G, R, L), products, between, from_start, to_end)


def _inside_gradients(
    inside: _Inside, dY: Tensor, d_reading: Tensor, d_writing_T: Tensor, dB: Tensor, d_whole: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of x (s,G,L,P), dt and g (s,H,L), B (s,G,L,N) and C (s,H,L,N), from what the loop left.

    dY (s*H,L,P); d_reading (s*H,L,N); d_writing_T (s*G,R*P,L); dB (s*G,L,N): of the states alone; d_whole (s,G,R)
    times its decay.
    """
    s, G, R, L = inside.dt.shape
    P, N = inside.x.shape[-1], inside.B.shape[-1]
    dY = dY.view(s * G, R * L, P)
    d_scores = torch.bmm(dY, inside.x.transpose(1, 2)).view(s, G, R, L, L).mul_(inside.between)
    undamped = d_scores * inside.products  # dt_j of it comes from D_ij, and so from G
    d_products = d_scores.mul_(inside.dt[..., None, :]).view(s * G, R * L, L)

    d_writing_T = d_writing_T.view(s, G, R, P, L)
    weight = inside.to_end * inside.dt
    d_weight = (d_writing_T * inside.x.transpose(1, 2).view(s, G, 1, P, L)).sum(3)
    written = d_weight * weight
    dx = torch.baddbmm(
        (d_writing_T * weight[..., None, :]).sum(2).view(s * G, P, L).transpose(1, 2),
        inside.scores.transpose(1, 2),
        dY,
    )
    read = (d_reading.view(s, G, R, L, N) * inside.C.view(s, G, R, L, N)).sum(-1) * inside.from_start
    dC = (d_reading.view(s, G, R, L, N) * inside.from_start[..., None]).view(s * G, R * L, N)
    dC = dC.baddbmm_(d_products, inside.B)
    dB = dB.baddbmm_(d_products.transpose(1, 2), inside.C)

    ddt = undamped.sum(-2) + d_weight * inside.to_end
    dg = decay_gradient(read, written, undamped.mul_(inside.dt[..., None, :]), d_whole)
    return (
        dx.view(s, G, L, P),
        ddt.view(s, G * R, L),
        dg.view(s, G * R, L),
        dB.view(s, G, L, N),
        dC.view(s, G * R, L, N),
    )


def _chunk_bytes(L: int, G: int, H: int, P: int, N: int, core: torch.dtype) -> int:
    """Of the buffers that one chunk takes in a segment."""
    return L * (H * (4 * L + 3 * P + 3 * N) + G * (2 * P + 2 * N)) * core.itemsize
