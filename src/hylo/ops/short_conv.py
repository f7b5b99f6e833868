"""Causal depthwise convolution over a few tokens, with the last inputs as its state: in front of every linear block."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hylo.ops.checks import check_tensors
from hylo.ops.chunks import check_packed

CPU_BLOCK, GPU_BLOCK = 1 << 18, 1 << 24  # numbers computed at once: few enough for a core's cache; a few passes


def short_conv(
    x_BTC: Tensor,
    weight_C1W: Tensor,
    bias_C: Tensor | None = None,
    state_NCS: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = bias + sum_j weight_j x_(t-W+1+j), channel by channel, summed in float32 or better.

    x (B,T,C), weight (C,1,W) as torch.nn.Conv1d stores it, state (N,C,W-1): the inputs before the first (None: zeros).
    cu_seqlens (N+1): B = 1 row packs N documents with these bounds, none of which sees another; None: N = B rows.
    Returns y (B,T,C) and the state after the last input (N,C,W-1), both in x's type. Raises ValueError for tensors and
    bounds that do not fit.
    """
    _check(x_BTC, weight_C1W, bias_C, state_NCS, cu_seqlens)
    past, T = weight_C1W.shape[-1] - 1, x_BTC.shape[1]
    weight_WC = weight_C1W[:, 0].T
    if cu_seqlens is None:
        state = None if state_NCS is None else state_NCS.transpose(1, 2).to(x_BTC.dtype)
        if T == 1:
            y, last = _step(x_BTC, weight_WC, bias_C, state)
        else:
            y, last = _Windows.apply(x_BTC, weight_WC, bias_C, state), _last(x_BTC, state, past)
        return y, last.transpose(1, 2)
    # Every document behind its own past in one long row: windows that reach over a bound are computed, but not read.
    bounds, N, device = cu_seqlens.to("cpu", torch.long), len(cu_seqlens) - 1, x_BTC.device
    shift_N = past * torch.arange(N, device="cpu")
    slots_T = torch.arange(T, device="cpu") + past + shift_N.repeat_interleave(bounds.diff())
    first_NS, last_NS = (
        (ends_N + shift_N)[:, None] + torch.arange(past, device="cpu") for ends_N in (bounds[:-1], bounds[1:])
    )
    slots_T, first_NS, last_NS = (t.to(device) for t in (slots_T, first_NS, last_NS))
    padded = x_BTC.new_zeros(T + N * past, x_BTC.shape[2]).index_copy(0, slots_T, x_BTC[0])
    if state_NCS is not None:
        padded = padded.index_copy(0, first_NS.flatten(), state_NCS.transpose(1, 2).flatten(0, 1).to(x_BTC.dtype))
    y = _Windows.apply(padded[None], weight_WC, bias_C, None)[0].index_select(0, slots_T)
    return y[None], padded[last_NS].transpose(1, 2)


def naive_short_conv(
    x_BTC: Tensor,
    weight_C1W: Tensor,
    bias_C: Tensor | None = None,
    state_NCS: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by torch's grouped convolution, document by document."""
    bounds = [0, x_BTC.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        x = x_BTC[:, start:end]
        state = state_NCS if state_NCS is None or cu_seqlens is None else state_NCS[n : n + 1]
        if state is None:
            padded_BTC = F.pad(x, (0, 0, weight_C1W.shape[-1] - 1, 0))
        else:
            padded_BTC = torch.cat((state.transpose(1, 2).to(x.dtype), x), dim=1)
        padded_BCT = padded_BTC.transpose(1, 2)
        if end > start:
            outputs.append(F.conv1d(padded_BCT, weight_C1W, bias_C, groups=weight_C1W.shape[0]).transpose(1, 2))
        states.append(padded_BCT[..., end - start :])
    return torch.cat(outputs, dim=1), torch.cat(states)


def _step(x_B1C: Tensor, weight_WC: Tensor, bias_C: Tensor | None, state_BSC: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token: y and the state after it, (B,1,C) and (B,W-1,C)."""
    core = torch.promote_types(x_B1C.dtype, torch.float32)
    window = _window(x_B1C, state_BSC, 0, 1, len(weight_WC) - 1, x_B1C.dtype)
    y = _convolve(window.to(core), weight_WC.to(core), None if bias_C is None else bias_C.to(core))
    return y.to(x_B1C.dtype), window[:, 1:]


class _Windows(torch.autograd.Function):
    """y (B,T,C) from x (B,T,C), weight (W,C), bias (C) and the past (B,W-1,C). Whole-tensor multiply-adds, block by
    block: on a CPU many times as fast as a grouped convolution of one channel a group. Keeps x itself, no copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, state)
        ctx.bias_dtype = None if bias is None else bias.dtype
        core = torch.promote_types(x.dtype, torch.float32)
        w, b = weight.to(core).contiguous(), None if bias is None else bias.to(core)
        if x.shape[1] <= _block(x, len(w)):
            return _convolve(_window(x, state, 0, x.shape[1], len(w) - 1, core), w, b).to(x.dtype)
        y = torch.empty_like(x)
        for start, end in _blocks(x, len(w)):
            y[:, start:end] = _convolve(_window(x, state, start, end, len(w) - 1, core), w, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, state = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_state = ctx.needs_input_grad
        (T, C), (W, _), core = x.shape[1:], weight.shape, torch.promote_types(x.dtype, torch.float32)
        w = weight.to(core).contiguous()
        d_x = torch.empty_like(x) if needs_x else None
        d_weight = torch.zeros(W, C, dtype=core, device=x.device) if needs_weight else None
        d_bias = torch.zeros(C, dtype=core, device=x.device) if needs_bias else None
        for start, end in _blocks(x, W):
            n, g = end - start, grad[:, start : end + W - 1].to(core)
            if d_x is not None:  # what was read by this token and the W-1 after it
                block = g[:, :n] * w[-1]
                for j in range(1, min(W, g.shape[1])):
                    later = g[:, j : j + n]
                    block[:, : later.shape[1]].addcmul_(later, w[-1 - j])
                d_x[:, start:end] = block
            if d_weight is not None:
                window = _window(x, state, start, end, W - 1, core)
                for j in range(W):
                    d_weight[j] += (g[:, :n] * window[:, j : j + n]).sum((0, 1))
            if d_bias is not None:
                d_bias += g[:, :n].sum((0, 1))
        d_state = None
        if needs_state:
            d_state = torch.zeros(state.shape, dtype=core, device=x.device)
            for t in range(min(W - 1, T)):
                d_state[:, t:].addcmul_(grad[:, t : t + 1].to(core), w[: W - 1 - t])
            d_state = d_state.to(state.dtype)
        return (
            d_x,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(ctx.bias_dtype),
            d_state,
        )


def _convolve(window_BTC: Tensor, weight_WC: Tensor, bias_C: Tensor | None) -> Tensor:
    """(B,T+W-1,C) -> (B,T,C)."""
    length = window_BTC.shape[1] - len(weight_WC) + 1
    last = window_BTC[:, len(weight_WC) - 1 :]
    y = last * weight_WC[-1] if bias_C is None else torch.addcmul(bias_C, last, weight_WC[-1])
    for j, w_C in enumerate(weight_WC[:-1]):
        y.addcmul_(window_BTC[:, j : j + length], w_C)
    return y


def _window(x: Tensor, state: Tensor | None, start: int, end: int, past: int, core: torch.dtype) -> Tensor:
    """Tokens from `past` before start up to end, in the core's type."""
    if start > 0:
        return x[:, start - past : end].to(core)
    first = x[:, :end].to(core)
    return F.pad(first, (0, 0, past, 0)) if state is None else torch.cat((state.to(core), first), dim=1)


def _last(x: Tensor, state: Tensor | None, past: int) -> Tensor:
    """The last inputs (B,W-1,C), copied, so that they do not keep all of them."""
    T = x.shape[1]
    if T >= past:
        return x[:, T - past :].clone()
    return F.pad(x, (0, 0, past - T, 0)) if state is None else torch.cat((state[:, T:], x), dim=1)


def _block(x: Tensor, width: int) -> int:
    """How many tokens are computed at once: at least a window's."""
    return max(width, (CPU_BLOCK if x.device.type == "cpu" else GPU_BLOCK) // max(1, len(x) * x.shape[2]))


def _blocks(x: Tensor, width: int) -> list[tuple[int, int]]:
    T, step = x.shape[1], _block(x, width)
    return [(start, min(start + step, T)) for start in range(0, T, step)]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    sizes = check_tensors(
        "short_conv", x=(x, "B T C"), weight=(weight, "C 1 W"), bias=(bias, "C"), state=(state, "N C S")
    )
    if cu_seqlens is not None:
        check_packed(x, cu_seqlens)
    if state is not None:
        expected = (len(x) if cu_seqlens is None else len(cu_seqlens) - 1, sizes["C"], sizes["W"] - 1)
        if state.shape != expected:
            raise ValueError(f"short_conv: state has shape {tuple(state.shape)}, expected (N, C, W-1) = {expected}")
