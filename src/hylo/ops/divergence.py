"""Divergence of two language models from their final hidden states, without a matrix of logits.

A language model's head turns hidden states h (N, D) into logits h W^T (N, V). Distillation needs a divergence between
the softmax of the student's and of the teacher's logits at each of N tokens; the logits themselves, at N = 65536 and
V = 128256, would take 31 GiB twice. So a tile of tokens by the whole vocabulary is worked off at a time, and the
gradient is taken while the tile is there: with s, t the logits over the temperature tau, and p_s, p_t their softmax,

    forward KL(p_t || p_s) = sum_j p_t (t - s) - lse(t) + lse(s)        d/ds = p_s - p_t
    reverse KL(p_s || p_t) = sum_j p_s (s - t) - lse(s) + lse(t)        d/ds = p_s ((s - t) - sum_j p_s (s - t))

There is no factor tau^2, and nothing flows back to the teacher.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Kind = Literal["forward_kl", "reverse_kl"]
TILE_ELEMENTS = 2**20  # logits in a tile, so that its four buffers stay in a CPU's cache,
TILE_ROWS = 256  # but never fewer tokens than this: a large head is read once a tile


def hidden_state_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    kind: Kind = "forward_kl",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """The divergence in nats, a scalar: summed over tokens, or averaged over them (over `mask.sum()` if masked).

    Shapes: student_hidden (N, D_s), student_head (V_s, D_s), teacher_hidden (N, D_t), teacher_head (V_t, D_t),
    mask (N,). Vocabularies that differ are cut to the rows both heads have. The gradient goes to the student's hidden
    states and, where it trains, to its head. Matrix products run in the inputs' dtype (in autocast's, inside it),
    softmax and sums in float32; float64 stays float64. An empty mask gives zero.
    """
    divergence: Tensor = _Divergence.apply(
        student_hidden, student_head, teacher_hidden, teacher_head, kind, temperature, mask, reduction
    )
    return divergence


def naive_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    kind: Kind = "forward_kl",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """The same from full logits and autograd: the reference."""
    vocabulary = min(len(student_head), len(teacher_head))
    student = torch.log_softmax(student_hidden @ student_head[:vocabulary].T / temperature, -1)
    teacher = torch.log_softmax((teacher_hidden @ teacher_head[:vocabulary].T / temperature).detach(), -1)
    p, log_ratio = (teacher.exp(), teacher - student) if kind == "forward_kl" else (student.exp(), student - teacher)
    weights = torch.ones_like(student[:, 0]) if mask is None else mask.to(student.dtype)
    total = ((p * log_ratio).sum(-1) * weights).sum()
    return total / weights.sum() if reduction == "mean" else total


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden_ND: Tensor,
        student_head_VD: Tensor,
        teacher_hidden_NE: Tensor,
        teacher_head_VE: Tensor,
        kind: Kind,
        temperature: float,
        mask_N: Tensor | None,
        reduction: str,
    ) -> Tensor:
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        N, V = len(student_hidden_ND), min(len(student_head_VD), len(teacher_head_VE))
        product = _product_dtype(student_hidden_ND)
        core = torch.float64 if product == torch.float64 else torch.float32
        weights_N = torch.ones(N, device=student_hidden_ND.device) if mask_N is None else mask_N
        weights_N = weights_N.to(core)
        if reduction == "mean":
            weights_N = weights_N / weights_N.sum().clamp_min(torch.finfo(core).tiny)

        tile = min(N, max(TILE_ROWS, TILE_ELEMENTS // V))
        buffers = [torch.empty(tile, V, dtype=core, device=student_hidden_ND.device) for _ in range(4)]
        with torch.autocast(student_hidden_ND.device.type, enabled=False):
            W_s, W_t = student_head_VD[:V].to(product), teacher_head_VE[:V].to(product)
            total = weights_N.new_zeros(())
            grad_hidden = torch.empty_like(student_hidden_ND) if wants_hidden else None
            grad_head = torch.zeros_like(student_head_VD, dtype=core) if wants_head else None
            for start in range(0, N, tile):
                rows = slice(start, min(start + tile, N))
                h_s, weights = student_hidden_ND[rows].to(product), weights_N[rows, None]
                s, t, p_s, p_t = (b[: len(h_s)] for b in buffers)
                _logits(h_s, W_s, temperature, s)
                _logits(teacher_hidden_NE[rows].to(product), W_t, temperature, t)
                lse_s, lse_t = _softmax(s, p_s), _softmax(t, p_t)
                if kind == "forward_kl":
                    total += weights[:, 0] @ (torch.linalg.vecdot(p_t, t.sub_(s)) - lse_t + lse_s)
                    gradient = p_s.sub_(p_t)
                else:
                    expected = torch.linalg.vecdot(p_s, s.sub_(t))
                    total += weights[:, 0] @ (expected - lse_s + lse_t)
                    gradient = s.sub_(expected[:, None]).mul_(p_s)
                gradient = gradient.to(product)
                weights = weights / temperature  # applied on the D-wide side, which is the narrow one
                if grad_hidden is not None:
                    grad_hidden[rows] = (gradient @ W_s).to(core).mul_(weights)
                if grad_head is not None:
                    weighted = (h_s * weights).to(product)
                    if product == core:
                        grad_head[:V].addmm_(gradient.T, weighted)
                    else:
                        grad_head[:V] += gradient.T @ weighted
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(student_head_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        if (
            grad_output.item() != 1.0
        ):  # usually it is, and then the head's gradient, often a step's largest, is not copied
            gradients = tuple(g if g is None else g * grad_output.to(g.dtype) for g in gradients)
        return *gradients, None, None, None, None, None, None


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _logits(hidden: Tensor, head: Tensor, temperature: float, out: Tensor) -> None:
    if hidden.dtype == out.dtype:
        torch.mm(hidden, head.T, out=out)
    else:
        out.copy_(hidden @ head.T)
    if temperature != 1.0:
        out.div_(temperature)


def _softmax(logits: Tensor, out: Tensor) -> Tensor:
    """Writes the softmax to `out` and returns log-sum-exp, read off the likeliest token instead of a second pass."""
    torch.softmax(logits, -1, out=out)
    return logits.amax(-1) - out.amax(-1).log()
