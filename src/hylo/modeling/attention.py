"""The base's own attention (Llama, Qwen2.5, Qwen3), for layers that keep it, and the norm that all mixers share."""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hylo.modeling.configuration import HyloConfig
from hylo.modeling.documents import Visible, pack, unpack
from hylo.modeling.rope import Rotary, rotary_key, scaled, turned
from hylo.ops.latent_attention import attend


class RMSNorm(nn.Module):
    """weight * x / rms(x) over the last dimension, the rms in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * inverse_rms(x, self.eps)).to(x.dtype)


class GivesWeights(nn.Module):
    """Calling it gives weight and bias, to a mixer that computes with them itself: accelerate, which keeps weights on
    disk or in main memory, brings a module's weights for its call alone."""

    weight: Tensor

    def forward(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, getattr(self, "bias", None)


class ShortConv(GivesWeights, nn.Conv1d):  # type: ignore[misc]  # forward is another
    """The convolution in front of a linear block, which hylo.ops.short_conv computes."""


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1/rms(x) over the last dimension (kept, of size 1), in float32 or better."""
    x = x if x.dtype == torch.float64 else x.float()
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class Attention(nn.Module):
    """Grouped-query attention with RoPE; Qwen3 normalises each query and key head first, Qwen2.5 has q, k, v biases."""

    def __init__(self, config: HyloConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.head_dim
        self.rotary_key = rotary_key(config, "attention", layer_idx)
        q_width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states_BTD: Tensor,
        attention_mask: Visible | None,
        rotary: Rotary,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        mask, padding, documents, filled = attention_mask or Visible()
        q, k, v = self.project(pack(hidden_states_BTD, documents), rotary)
        if past_key_values is not None:
            k, v = (t[:, :, :filled] for t in past_key_values.update(k, v, self.layer_idx))
        lengths = None if documents is None else documents.lengths
        o = attend(q, k, v, mask, self.head_dim**-0.5, lengths, padding)
        return unpack(self.o_proj(o.transpose(1, 2).flatten(2)), documents)

    def project(self, x_BTD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B,H,T,d), keys and values (B,K,T,d) as they enter the softmax."""
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x_BTD).view(heads)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x_BTD).view(heads)).transpose(1, 2)
        v = self.v_proj(x_BTD).view(heads).transpose(1, 2)
        return scaled(turned(q, rotary, self.rotary_key), rotary), turned(k, rotary, self.rotary_key), v
