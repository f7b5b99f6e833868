"""Divergence of two language models from their final hidden states, without a matrix of logits.

A language model's head turns hidden states h (N, D) into logits h W^T (N, V). Distillation needs a divergence between
the softmax of the student's and of the teacher's logits at each of N tokens; the logits themselves, at N = 65536 and
V = 128256, would take 31 GiB twice. So a tile of tokens by the whole vocabulary is worked off at a time, and the
gradient is taken while the tile is there. With s, t the logits over the temperature, p_s, p_t their softmax,
d = log p_t - log p_s and m = beta p_t + (1 - beta) p_s,

    forward KL(p_t || p_s) = sum p_t d                                       d/ds = p_s - p_t
    reverse KL(p_s || p_t) = -sum p_s d                                      d/ds = p_s (-d - KL)
    JSD = beta KL(p_t || m) + (1 - beta) KL(p_s || m)                        d/ds = (1 - beta) p_s (r - KL(p_s || m))
          where r = log(p_s / m) = -log(1 - beta + beta exp(d)) and log(p_t / m) = d + r

There is no factor tau^2, and nothing flows back to the teacher.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from hylo.ops.checks import check_tensors
from hylo.ops.head_products import Gradients, scaled_gradients, times_head, trainable, write_logits
from hylo.ops.head_tiles import (
    block_height,
    check_choice,
    check_temperature,
    check_tokens,
    core_dtype,
    product_dtype,
    row_kernels,
    slices,
    softmax,
    softmax_,
    tile_height,
    token_weights,
)

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
KINDS = ("forward_kl", "reverse_kl", "jsd")
Reduction = Literal["mean", "sum"]
REDUCTIONS = ("mean", "sum")


def hidden_state_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    kind: Kind = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> Tensor:
    """The divergence in nats, a scalar: summed over tokens, or averaged over them (over `mask.sum()` if masked).

    Shapes: student_hidden (N, D_s), student_head (V_s, D_s), teacher_hidden (N, D_t), teacher_head (V_t, D_t),
    mask (N,) of booleans or weights, student_bias (V_s,), teacher_bias (V_t,). Vocabularies that differ are cut to the
    rows both heads have. The gradient goes to the student's hidden states and, where they train, to its head and bias;
    what does not train is not computed.

    `beta`, strictly between 0 and 1, is the teacher's weight in the mixture of "jsd", the generalised Jensen-Shannon
    divergence of GKD (arXiv 2306.13649, equation 1): divided by beta it tends to the forward KL as beta goes to 0, and
    divided by 1 - beta to the reverse KL as beta goes to 1. At 0.5 it is the symmetric one, at most log 2.

    Matrix products run in student_hidden's dtype (in autocast's, inside it), softmax and sums in float32, in float64
    for float64. In float32 the value of a token is off by some 1e-6 nat, so that equal models give 0 to that. An empty
    mask gives zero. Heads may be shared out over processes by rows (hylo.ops.sharded_divergence; of one vocabulary, and
    without biases). Raises ValueError where arguments do not fit.
    """
    if isinstance(student_head, DTensor) and isinstance(teacher_head, DTensor):
        from hylo.ops.sharded_divergence import sharded_divergence

        return sharded_divergence(
            student_hidden, student_head, teacher_hidden, teacher_head, kind, temperature, beta, mask, reduction
        )
    _check(
        student_hidden, student_head, teacher_hidden, teacher_head, kind, temperature, beta, mask, reduction,
        student_bias, teacher_bias,
    )  # fmt: skip
    divergence: Tensor = _Divergence.apply(
        *trainable(student_hidden, student_head, student_bias),
        teacher_hidden,
        teacher_head,
        teacher_bias,
        kind,
        temperature,
        beta,
        mask,
        reduction,
    )
    return divergence


def naive_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    kind: Kind = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> Tensor:
    """The same from full logits and autograd: the reference."""
    vocabulary = min(len(student_head), len(teacher_head))
    logits = []
    for hidden, head, bias in (
        (student_hidden, student_head, student_bias),
        (teacher_hidden.detach(), teacher_head.detach(), None if teacher_bias is None else teacher_bias.detach()),
    ):
        logits.append(torch.nn.functional.linear(hidden, head, bias)[:, :vocabulary] / temperature)
    student, teacher = (torch.log_softmax(x, -1) for x in logits)
    if kind == "forward_kl":
        values = (teacher.exp() * (teacher - student)).sum(-1)
    elif kind == "reverse_kl":
        values = (student.exp() * (student - teacher)).sum(-1)
    else:
        mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
        values = beta * (teacher.exp() * (teacher - mixture)).sum(-1)
        values = values + (1 - beta) * (student.exp() * (student - mixture)).sum(-1)
    weights = torch.ones_like(values) if mask is None else mask.to(values.dtype)
    total = (values * weights).sum()
    return total / weights.sum() if reduction == "mean" else total


def _check(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    kind: Kind,
    temperature: float,
    beta: float,
    mask: Tensor | None,
    reduction: Reduction,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
) -> None:
    operation = "hidden_state_divergence"
    check_tensors(
        operation,
        student_hidden=(student_hidden, "N D_s"),
        student_head=(student_head, "V_s D_s"),
        teacher_hidden=(teacher_hidden, "N D_t"),
        teacher_head=(teacher_head, "V_t D_t"),
        student_bias=(student_bias, "V_s"),
        teacher_bias=(teacher_bias, "V_t"),
    )
    check_tokens(operation, "mask", mask, student_hidden)
    check_choice(operation, "kind", kind, KINDS)
    check_choice(operation, "reduction", reduction, REDUCTIONS)
    check_temperature(operation, temperature)
    if not 0.0 < beta < 1.0:
        raise ValueError(f"{operation}: beta is {beta}, expected a number between 0 and 1, neither included")


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden_ND: Tensor,
        student_head_VD: Tensor,
        student_bias_V: Tensor | None,
        teacher_hidden_NE: Tensor,
        teacher_head_VE: Tensor,
        teacher_bias_V: Tensor | None,
        kind: Kind,
        temperature: float,
        beta: float,
        mask_N: Tensor | None,
        reduction: Reduction,
    ) -> Tensor:
        N, V = len(student_hidden_ND), min(len(student_head_VD), len(teacher_head_VE))
        product = product_dtype(student_hidden_ND)
        core = core_dtype(product)
        kernels = row_kernels(student_hidden_ND)
        weights_N = token_weights(mask_N, student_hidden_ND, reduction, core)
        scale = (1.0 - beta if kind == "jsd" else 1.0) / temperature  # of gradients, beside a token's weight
        total = weights_N.new_zeros(())
        with torch.autocast(student_hidden_ND.device.type, enabled=False):
            W_s, W_t = student_head_VD[:V].to(product), teacher_head_VE[:V].to(product)
            b_s, b_t = (b if b is None else b[:V].to(core) for b in (student_bias_V, teacher_bias_V))
            gradients = Gradients(ctx, product, student_hidden_ND, student_head_VD, student_bias_V)
            tile = product if kernels else core
            height = tile_height(N, V, 2 * V * tile.itemsize)
            buffers = [torch.empty(height, V, dtype=tile, device=student_hidden_ND.device) for _ in range(2)]
            for rows in slices(N, height):
                h_s, h_t = student_hidden_ND[rows].to(product), teacher_hidden_NE[rows].to(product)
                s, t = (buffer[: len(h_s)] for buffer in buffers)
                if kernels:
                    torch.mm(h_s, W_s.T, out=s)
                    torch.mm(h_t, W_t.T, out=t)
                    values = kernels.divergence_rows_(s, t, b_s, b_t, kind, temperature, beta)
                else:
                    write_logits(h_s, W_s, b_s, temperature, s)
                    write_logits(h_t, W_t, b_t, temperature, t)
                    values = _divergence_(s, t, kind, beta)
                total += weights_N[rows] @ values
                gradients.add(rows, s, weights_N[rows] * scale, h_s, W_s)
        gradients.save(ctx)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, grad_output), *[None] * 8


def _divergence_(student_nV: Tensor, teacher_nV: Tensor, kind: Kind, beta: float) -> Tensor:
    """Returns each row's divergence (n,); the student's logits become its gradient (without jsd's factor 1 - beta)."""
    values = student_nV.new_empty(len(student_nV))
    height = block_height(student_nV)
    scratch_s, scratch_t = torch.empty_like(student_nV[:height]), torch.empty_like(student_nV[:height])
    for rows in slices(len(student_nV), height):
        s, t = student_nV[rows], teacher_nV[rows]
        p_s, p_t = scratch_s[: len(s)], scratch_t[: len(s)]
        log_sum = softmax(t, p_t) - softmax(s, p_s)
        d = t.sub_(s).sub_(log_sum[:, None])
        if kind == "forward_kl":
            values[rows] = torch.linalg.vecdot(p_t, d)
            torch.sub(p_s, p_t, out=s)
        elif kind == "reverse_kl":
            values[rows] = value = torch.linalg.vecdot(p_s, d).neg_()
            torch.add(d, value[:, None], out=s).mul_(p_s).neg_()
        else:
            r = torch.add(d, math.log(beta), out=s)
            torch.logaddexp(r, r.new_tensor(math.log1p(-beta)), out=r).neg_()
            kl_s = torch.linalg.vecdot(p_s, r)
            values[rows] = beta * torch.linalg.vecdot(p_t, d.add_(r)) + (1.0 - beta) * kl_s
            r.sub_(kl_s[:, None]).mul_(p_s)
    return values


@torch.no_grad()
def teacher_vectors(
    teacher_hidden: Tensor, teacher_head: Tensor, student_head: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """All that the forward KL needs of a teacher once the student's head is frozen: one vector and one number a token.

    Shapes: teacher_hidden (N, D_t), teacher_head (V_t, D_t), student_head (V_s, D_s). With p = softmax(W_t h_t / tau)
    over the rows that both heads have, returns the vectors c = W_s^T p / tau (N, D_s) and the negative entropies
    sum p log p (N,), in nats; both in float32, in float64 for float64 hidden states. They hold for this student_head
    and this temperature only; see `cached_divergence`. The teacher's logits are a product in teacher_hidden's dtype (in
    autocast's, inside it): pass float32 to match a live divergence in float32.
    """
    operation = "teacher_vectors"
    check_tensors(
        operation,
        teacher_hidden=(teacher_hidden, "N D_t"),
        teacher_head=(teacher_head, "V_t D_t"),
        student_head=(student_head, "V_s D_s"),
    )
    check_temperature(operation, temperature)
    N, V = len(teacher_hidden), min(len(teacher_head), len(student_head))
    product = product_dtype(teacher_hidden)
    core = core_dtype(product)
    vectors = torch.empty(N, student_head.shape[1], dtype=core, device=teacher_hidden.device)
    neg_entropy = torch.empty(N, dtype=core, device=teacher_hidden.device)
    with torch.autocast(teacher_hidden.device.type, enabled=False):
        W_t, W_s = teacher_head[:V].to(product), student_head[:V]
        height = tile_height(N, V, V * core.itemsize)
        buffer = torch.empty(height, V, dtype=core, device=teacher_hidden.device)
        for rows in slices(N, height):
            h = teacher_hidden[rows].to(product)
            p = buffer[: len(h)]
            write_logits(h, W_t, None, temperature, p)
            neg_entropy[rows] = softmax_(p)[1]
            # Never in bf16, where p would lose more than two good models differ by.
            vectors[rows] = times_head(p, W_s, core).div_(temperature)
    return vectors, neg_entropy


def cached_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    vectors: Tensor,
    neg_entropy: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """The forward KL(p_t || p_s) from `teacher_vectors`, exact over the whole vocabulary, without the teacher.

    With c the vectors (N, D), the value of a token is logsumexp(W h / tau) - <h, c> + neg_entropy, and its gradient to
    the hidden states W^T p_s / tau - c. Shapes: student_hidden (N, D), student_head (V, D), neg_entropy (N,), mask
    (N,). The head must be the frozen one that the vectors were made with, cut to the vocabulary that it has in common
    with the teacher's: ValueError if it trains. In float32 the value of a token is off by some 1e-6, being a difference
    of numbers near 10; vectors kept in bf16 cost far more.
    """
    if isinstance(student_head, DTensor):
        from hylo.ops.sharded_divergence import sharded_cached_divergence

        return sharded_cached_divergence(
            student_hidden, student_head, vectors, neg_entropy, temperature, mask, reduction
        )
    operation = "cached_divergence"
    check_tensors(
        operation,
        student_hidden=(student_hidden, "N D"),
        student_head=(student_head, "V D"),
        vectors=(vectors, "N D"),
        neg_entropy=(neg_entropy, "N"),
    )
    check_tokens(operation, "mask", mask, student_hidden)
    check_choice(operation, "reduction", reduction, REDUCTIONS)
    check_temperature(operation, temperature)
    if student_head.requires_grad:
        raise ValueError(f"{operation}: student_head requires a gradient, expected the frozen head of the vectors")
    divergence: Tensor = _CachedDivergence.apply(
        *trainable(student_hidden), student_head, vectors, neg_entropy, temperature, mask, reduction
    )
    return divergence


class _CachedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden_ND: Tensor,
        student_head_VD: Tensor,
        vectors_ND: Tensor,
        neg_entropy_N: Tensor,
        temperature: float,
        mask_N: Tensor | None,
        reduction: Reduction,
    ) -> Tensor:
        N, V = len(student_hidden_ND), len(student_head_VD)
        product = product_dtype(student_hidden_ND)
        core = core_dtype(product)
        weights_N = token_weights(mask_N, student_hidden_ND, reduction, core)
        grad_hidden = torch.empty_like(student_hidden_ND) if ctx.needs_input_grad[0] else None
        total = weights_N.new_zeros(())
        with torch.autocast(student_hidden_ND.device.type, enabled=False):
            W = student_head_VD.to(product)
            height = tile_height(N, V, V * core.itemsize)
            buffer = torch.empty(height, V, dtype=core, device=student_hidden_ND.device)
            for rows in slices(N, height):
                h, c, weights = student_hidden_ND[rows].to(product), vectors_ND[rows].to(core), weights_N[rows]
                p = buffer[: len(h)]
                write_logits(h, W, None, temperature, p)
                lse, _ = softmax_(p)
                total += weights @ (lse - torch.linalg.vecdot(h.to(core), c) + neg_entropy_N[rows].to(core))
                if grad_hidden is not None:
                    gradient = times_head(p, W, product).to(core).div_(temperature).sub_(c)
                    grad_hidden[rows] = gradient.mul_(weights[:, None])
        ctx.save_for_backward(grad_hidden)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, grad_output), *[None] * 6
