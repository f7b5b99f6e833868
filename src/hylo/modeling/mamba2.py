"""The Mamba-2 mixer (Dao and Gu, arXiv 2405.21060) in the shape of Mamba-in-Llama (arXiv 2408.15237): x and B have the
base's kv heads and are repeated to all heads after the convolution; C has a group per query head."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from hylo.modeling.attention import ShortConv, inverse_rms
from hylo.modeling.cache import read_states, write_states
from hylo.modeling.configuration import HyloConfig
from hylo.modeling.documents import Documents, pack, unpack
from hylo.modeling.rope import Rotary, rotary_key, turned
from hylo.ops.short_conv import short_conv
from hylo.ops.ssd import ssd


class GroupedRMSNorm(nn.Module):
    """RMSNorm of every head by itself; weight (heads * head_dim,)."""

    def __init__(self, width: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.num_heads, self.eps = num_heads, eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        heads = x_BTD.unflatten(-1, (self.num_heads, -1))
        return self.weight * (heads * inverse_rms(heads, self.eps)).to(x_BTD.dtype).flatten(-2)


class Mamba2(nn.Module):
    """out = out_proj(norm(y * silu(z))), y from the state-space recurrence over the convolved x, B, C."""

    def __init__(self, config: HyloConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.num_heads = layer_idx, config.mamba_num_heads
        self.rotary_key = rotary_key(config, "mamba2", layer_idx)
        self.head_dim, self.d_state = config.mamba_head_dim, config.mamba_d_state
        d_inner, d_xb = config.mamba_d_inner, config.mamba_d_xb
        groups = d_xb // self.head_dim
        # z, x, B, C, dt
        self.widths = [d_inner, d_xb, groups * self.d_state, self.num_heads * self.d_state, self.num_heads]
        channels = sum(self.widths[1:4])
        self.in_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=config.qkv_bias)
        self.conv1d = ShortConv(channels, channels, config.conv_kernel_size, groups=channels)
        self.dt_bias = nn.Parameter(torch.zeros(self.num_heads))
        self.A_log = nn.Parameter(torch.zeros(self.num_heads))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm = GroupedRMSNorm(d_inner, self.num_heads, config.rms_norm_eps)
        self.out_proj = nn.Linear(d_inner, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states_BTD: Tensor,
        documents: Documents | None = None,
        rotary: Rotary | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """documents: where rows are padded or packed; padding gives zeros. `rotary`: read under positions hype."""
        d_inner, *channels, num_heads = self.widths
        cu_seqlens = None if documents is None else documents.cu_seqlens
        zxBCdt = self.in_proj(pack(hidden_states_BTD, documents))
        z, xBC, dt = zxBCdt.split([d_inner, sum(channels), num_heads], dim=-1)

        conv_state, state = read_states(past_key_values, self.layer_idx)
        weight, bias = self.conv1d()
        xBC, conv_state = short_conv(xBC, weight, bias, conv_state, cu_seqlens)
        x, B, C = F.silu(xBC).split(channels, dim=-1)
        B, C = (t.unflatten(-1, (-1, self.d_state)) for t in (B, C))
        B, C = (turned(t, rotary, self.rotary_key, heads=2) for t in (B, C))
        y, state = ssd(
            x.unflatten(-1, (-1, self.head_dim)),
            dt,
            self.A_log,
            B,
            C,
            self.D,
            self.dt_bias,
            initial_state=state,
            output_final_state=past_key_values is not None,
            cu_seqlens=cu_seqlens,
        )
        write_states(past_key_values, self.layer_idx, conv_state, state)
        return unpack(self.out_proj(self.norm(y.flatten(2) * F.silu(z))), documents)
