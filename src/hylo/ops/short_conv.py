"""Causal depthwise convolution over a few tokens, with the last inputs as its state: in front of every linear block."""

import torch
from torch import Tensor
from torch.nn import functional as F


def short_conv(
    x_BTC: Tensor, weight_C1W: Tensor, bias_C: Tensor | None = None, state_BCS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y_t = bias + sum_j weight_j x_(t-W+1+j), channel by channel.

    x (B,T,C), weight (C,1,W) as torch.nn.Conv1d stores it, state (B,C,W-1): the inputs before the first (None: zeros).
    Returns y (B,T,C) and the state after the last input (B,C,W-1).
    """
    length, width = x_BTC.shape[1], weight_C1W.shape[-1]
    padded = _with_past(x_BTC, state_BCS, width)
    # Whole-tensor multiply-adds: on a CPU several times as fast as a grouped convolution of one channel a group.
    y = padded[:, :length] * weight_C1W[:, 0, 0] if bias_C is None else bias_C
    for j in range(0 if bias_C is not None else 1, width):
        y = torch.addcmul(y, padded[:, j : j + length], weight_C1W[:, 0, j])
    return y, padded[:, length:].transpose(1, 2)


def naive_short_conv(
    x_BTC: Tensor, weight_C1W: Tensor, bias_C: Tensor | None = None, state_BCS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same by torch's grouped convolution."""
    padded_BCT = _with_past(x_BTC, state_BCS, weight_C1W.shape[-1]).transpose(1, 2)
    y = F.conv1d(padded_BCT, weight_C1W, bias_C, groups=weight_C1W.shape[0])
    return y.transpose(1, 2), padded_BCT[..., x_BTC.shape[1] :]


def _with_past(x_BTC: Tensor, state_BCS: Tensor | None, width: int) -> Tensor:
    if state_BCS is None:
        return F.pad(x_BTC, (0, 0, width - 1, 0))
    return torch.cat((state_BCS.transpose(1, 2).to(x_BTC.dtype), x_BTC), dim=1)
