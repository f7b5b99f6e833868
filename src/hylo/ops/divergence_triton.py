"""The GPU's part of hylo.ops.divergence and hylo.ops.cross_entropy: one Triton program a row of a tile of logits.

The products with the heads are the BLAS library's; what lies between them, a dozen elementwise passes in torch, is one
kernel here. It reads a row's logits, in whatever dtype the product left them, adds the bias, divides by the temperature
and works in float32: a first pass takes log-sum-exps and, for both KLs, the value, by running maxima that every lane of
the block keeps for itself; jsd takes its value in a second pass; the last pass writes the gradient over the student's
logits. Import this module only where Triton is installed (hylo.ops.head_tiles.row_kernels does).
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # columns at a time; with 8 warps 64 registers a thread
WARPS = 8
FORWARD_KL, REVERSE_KL, JSD = 0, 1, 2
KIND_NUMBERS = {"forward_kl": FORWARD_KL, "reverse_kl": REVERSE_KL, "jsd": JSD}


def divergence_rows_(
    student_nV: Tensor,
    teacher_nV: Tensor,
    student_bias_V: Tensor | None,
    teacher_bias_V: Tensor | None,
    kind: str,
    temperature: float,
    beta: float,
) -> Tensor:
    """Each row's divergence (n,) in float32, from products hidden @ head.T; the student's become its gradient.

    The gradient is that to logits over the temperature, without jsd's factor 1 - beta, and in the tile's dtype.
    """
    n, V = student_nV.shape
    values = torch.empty(n, dtype=torch.float32, device=student_nV.device)
    with _on(student_nV):
        _divergence_kernel[(n,)](
            student_nV,
            teacher_nV,
            student_nV if student_bias_V is None else student_bias_V,
            teacher_nV if teacher_bias_V is None else teacher_bias_V,
            values,
            student_nV.stride(0),
            teacher_nV.stride(0),
            V,
            1.0 / temperature,
            beta,
            KIND=KIND_NUMBERS[kind],
            STUDENT_BIAS=student_bias_V is not None,
            TEACHER_BIAS=teacher_bias_V is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return values


def cross_entropy_rows_(logits_nV: Tensor, bias_V: Tensor | None, labels_n: Tensor) -> Tensor:
    """Each row's cross-entropy (n,) in float32, from products hidden @ head.T, which become its gradient."""
    n, V = logits_nV.shape
    values = torch.empty(n, dtype=torch.float32, device=logits_nV.device)
    with _on(logits_nV):
        _cross_entropy_kernel[(n,)](
            logits_nV,
            logits_nV if bias_V is None else bias_V,
            labels_n,
            values,
            logits_nV.stride(0),
            V,
            BIAS=bias_V is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return values


def _on(tensor: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def _logits(row_ptr, bias_ptr, columns, V, scale, BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.load(row_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
    return x * scale


@triton.jit
def _jsd_log_ratio(d, beta):  # type: ignore[no-untyped-def]
    """log(p_s / m) = -log(1 - beta + beta exp(d)) for d = log(p_t / p_s) of either sign and any size."""
    a = d + tl.log(beta)
    b = tl.log(1.0 - beta)
    return -(tl.maximum(a, b) + tl.log(1.0 + tl.exp(-tl.abs(a - b))))


@triton.jit
def _divergence_kernel(  # type: ignore[no-untyped-def]
    s_ptr,
    t_ptr,
    s_bias_ptr,
    t_bias_ptr,
    value_ptr,
    s_stride,
    t_stride,
    V,
    scale,
    beta,
    KIND: tl.constexpr,
    STUDENT_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_row = s_ptr + row * s_stride
    t_row = t_ptr + row * t_stride
    lanes = tl.arange(0, BLOCK)

    # Every lane's running maximum and sum of exponentials, and the mean of t - s or s - t under the KL's first model.
    s_top = tl.full((BLOCK,), -3.0e38, tl.float32)
    t_top = tl.full((BLOCK,), -3.0e38, tl.float32)
    s_sum = tl.zeros((BLOCK,), tl.float32)
    t_sum = tl.zeros((BLOCK,), tl.float32)
    gap_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + lanes
        inside = columns < V
        s = _logits(s_row, s_bias_ptr, columns, V, scale, STUDENT_BIAS)
        t = _logits(t_row, t_bias_ptr, columns, V, scale, TEACHER_BIAS)
        s_new = tl.where(inside, tl.maximum(s_top, s), s_top)
        t_new = tl.where(inside, tl.maximum(t_top, t), t_top)
        s_exp = tl.where(inside, tl.exp(tl.minimum(s - s_new, 0.0)), 0.0)
        t_exp = tl.where(inside, tl.exp(tl.minimum(t - t_new, 0.0)), 0.0)
        s_rescale = tl.exp(s_top - s_new)
        t_rescale = tl.exp(t_top - t_new)
        s_sum = s_sum * s_rescale + s_exp
        t_sum = t_sum * t_rescale + t_exp
        if KIND == 0:
            gap_sum = gap_sum * t_rescale + t_exp * (t - s)
        if KIND == 1:
            gap_sum = gap_sum * s_rescale + s_exp * (s - t)
        s_top = s_new
        t_top = t_new

    s_max = tl.max(s_top, axis=0)
    t_max = tl.max(t_top, axis=0)
    s_total = tl.sum(s_sum * tl.exp(s_top - s_max), axis=0)
    t_total = tl.sum(t_sum * tl.exp(t_top - t_max), axis=0)
    s_lse = s_max + tl.log(s_total)
    t_lse = t_max + tl.log(t_total)
    value = 0.0
    s_mean = 0.0
    if KIND == 0:
        value = tl.sum(gap_sum * tl.exp(t_top - t_max), axis=0) / t_total - (t_lse - s_lse)
    if KIND == 1:
        value = tl.sum(gap_sum * tl.exp(s_top - s_max), axis=0) / s_total - (s_lse - t_lse)
        s_mean = value
    if KIND == 2:
        s_ratio = tl.zeros((BLOCK,), tl.float32)
        t_ratio = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            columns = start + lanes
            inside = columns < V
            s = _logits(s_row, s_bias_ptr, columns, V, scale, STUDENT_BIAS) - s_lse
            t = _logits(t_row, t_bias_ptr, columns, V, scale, TEACHER_BIAS) - t_lse
            r = _jsd_log_ratio(t - s, beta)
            s_ratio += tl.where(inside, tl.exp(s) * r, 0.0)
            t_ratio += tl.where(inside, tl.exp(t) * (t - s + r), 0.0)
        s_mean = tl.sum(s_ratio, axis=0)
        value = beta * tl.sum(t_ratio, axis=0) + (1.0 - beta) * s_mean
    tl.store(value_ptr + row, value)

    for start in range(0, V, BLOCK):
        columns = start + lanes
        s = _logits(s_row, s_bias_ptr, columns, V, scale, STUDENT_BIAS) - s_lse
        t = _logits(t_row, t_bias_ptr, columns, V, scale, TEACHER_BIAS) - t_lse
        if KIND == 0:
            gradient = tl.exp(s) - tl.exp(t)
        elif KIND == 1:
            gradient = tl.exp(s) * (s - t - s_mean)
        else:
            gradient = tl.exp(s) * (_jsd_log_ratio(t - s, beta) - s_mean)
        tl.store(s_row + columns, gradient.to(s_ptr.dtype.element_ty), mask=columns < V)


@triton.jit
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    s_ptr, bias_ptr, label_ptr, value_ptr, stride, V, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    s_row = s_ptr + row * stride
    lanes = tl.arange(0, BLOCK)
    label = tl.load(label_ptr + row)
    of_label = _logits(s_row, bias_ptr, label, V, 1.0, BIAS)  # before the gradient is written over it

    top = tl.full((BLOCK,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + lanes
        s = _logits(s_row, bias_ptr, columns, V, 1.0, BIAS)
        new = tl.where(columns < V, tl.maximum(top, s), top)
        total = total * tl.exp(top - new) + tl.where(columns < V, tl.exp(tl.minimum(s - new, 0.0)), 0.0)
        top = new
    s_max = tl.max(top, axis=0)
    lse = s_max + tl.log(tl.sum(total * tl.exp(top - s_max), axis=0))
    tl.store(value_ptr + row, lse - of_label)

    for start in range(0, V, BLOCK):
        columns = start + lanes
        p = tl.exp(_logits(s_row, bias_ptr, columns, V, 1.0, BIAS) - lse)
        gradient = tl.where(columns == label, p - 1.0, p)
        tl.store(s_row + columns, gradient.to(s_ptr.dtype.element_ty), mask=columns < V)
