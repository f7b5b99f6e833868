"""Causal depthwise convolution over a few tokens, with the last inputs as its state: in front of every linear block."""

import torch
from torch import Tensor
from torch.nn import functional as F

from hylo.ops.chunks import check_packed


def short_conv(
    x_BTC: Tensor,
    weight_C1W: Tensor,
    bias_C: Tensor | None = None,
    state_NCS: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = bias + sum_j weight_j x_(t-W+1+j), channel by channel.

    x (B,T,C), weight (C,1,W) as torch.nn.Conv1d stores it, state (N,C,W-1): the inputs before the first (None: zeros).
    cu_seqlens (N+1): B = 1 row packs N documents with these bounds, none of which sees another; None: N = B rows.
    Returns y (B,T,C) and the state after the last input (N,C,W-1). Raises ValueError for bounds that do not fit.
    """
    past = weight_C1W.shape[-1] - 1
    if cu_seqlens is None:
        padded = _with_past(x_BTC, state_NCS, past)
        return _windows(padded, weight_C1W, bias_C), padded[:, x_BTC.shape[1] :].transpose(1, 2)
    # Every document behind its own past in one long row: windows that reach over a bound are computed, but not read.
    check_packed(x_BTC, cu_seqlens)
    bounds, T, N, device = cu_seqlens.to("cpu", torch.long), x_BTC.shape[1], len(cu_seqlens) - 1, x_BTC.device
    shift_N = past * torch.arange(N, device="cpu")
    slots_T = torch.arange(T, device="cpu") + past + shift_N.repeat_interleave(bounds.diff())
    first_NS, last_NS = (
        (ends_N + shift_N)[:, None] + torch.arange(past, device="cpu") for ends_N in (bounds[:-1], bounds[1:])
    )
    slots_T, first_NS, last_NS = (t.to(device) for t in (slots_T, first_NS, last_NS))
    padded = x_BTC.new_zeros(T + N * past, x_BTC.shape[2]).index_copy(0, slots_T, x_BTC[0])
    if state_NCS is not None:
        padded = padded.index_copy(0, first_NS.flatten(), state_NCS.transpose(1, 2).flatten(0, 1).to(x_BTC.dtype))
    y = _windows(padded[None], weight_C1W, bias_C)[0].index_select(0, slots_T - past)
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
        state = state_NCS if state_NCS is None or cu_seqlens is None else state_NCS[n : n + 1]
        padded_BCT = _with_past(x_BTC[:, start:end], state, weight_C1W.shape[-1] - 1).transpose(1, 2)
        if end > start:
            outputs.append(F.conv1d(padded_BCT, weight_C1W, bias_C, groups=weight_C1W.shape[0]).transpose(1, 2))
        states.append(padded_BCT[..., end - start :])
    return torch.cat(outputs, dim=1), torch.cat(states)


def _windows(padded_BTC: Tensor, weight_C1W: Tensor, bias_C: Tensor | None) -> Tensor:
    """y (B,T-W+1,C). Whole-tensor multiply-adds: on a CPU several times as fast as a grouped convolution of one channel
    a group."""
    width = weight_C1W.shape[-1]
    length = padded_BTC.shape[1] - width + 1
    y = padded_BTC[:, :length] * weight_C1W[:, 0, 0] if bias_C is None else bias_C
    for j in range(0 if bias_C is not None else 1, width):
        y = torch.addcmul(y, padded_BTC[:, j : j + length], weight_C1W[:, 0, j])
    return y


def _with_past(x_BTC: Tensor, state_BCS: Tensor | None, past: int) -> Tensor:
    if state_BCS is None:
        return F.pad(x_BTC, (0, 0, past, 0))
    return torch.cat((state_BCS.transpose(1, 2).to(x_BTC.dtype), x_BTC), dim=1)
