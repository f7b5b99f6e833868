"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) with the base's own number of kv heads.

What is cached per token is the latent (kv_lora_rank values) and one rotated key shared by all heads (qk_rope_head_dim
values), as the `keys` and `values` of a single head in transformers' cache. On Qwen3 the key norm's 1/rms depends on kv
head and token: these num_key_value_heads numbers are cached beside the rotated key, so that decoding needs no old keys.
With a `folded` key norm the conversion has multiplied its mean into the projections, and nothing more is cached.

`attention_gate` multiplies every channel of the heads' outputs by sigmoid(g_proj x) before the output projection (Gated
Attention, arXiv 2505.06708); `positions` other than rope leave the rotated parts as they are.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from hylo.modeling.attention import GivesWeights, RMSNorm, inverse_rms
from hylo.modeling.configuration import HyloConfig
from hylo.modeling.documents import Visible, pack, unpack
from hylo.modeling.rope import Rotary, rotary_key, scaled, turned
from hylo.ops.latent_attention import absorbed_latent_attention, expanded_latent_attention


class UpProjection(GivesWeights, nn.Linear):  # type: ignore[misc]  # forward is another
    """From the latent to every kv head's [nope | v], which hylo.ops.latent_attention applies to keys or to queries."""


class KeyNorm(GivesWeights, RMSNorm):  # type: ignore[misc]
    """Qwen3's key norm, whose weight goes to the queries and whose 1/rms to the cache."""


class MultiHeadLatentAttention(nn.Module):
    """Heads laid out [nope | rope]; softmax scale (nope + rope)^-0.5, which YaRN leaves alone."""

    def __init__(self, config: HyloConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_kv_heads = config.num_key_value_heads
        self.rank, self.nope, self.rope = config.kv_rank(layer_idx), config.qk_nope_head_dim, config.qk_rope_head_dim
        self.qk_head_dim = self.nope + self.rope
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * self.qk_head_dim, bias=config.qkv_bias)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.rank + self.rope, bias=config.qkv_bias)
        up = self.num_kv_heads * (self.nope + config.v_head_dim)
        self.kv_b_proj = UpProjection(self.rank, up, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=False)
        self.gated = config.attention_gate
        if self.gated:
            self.g_proj = nn.Linear(hidden, heads * config.v_head_dim, bias=False)
        self.rotary_key = rotary_key(config, "mla", layer_idx)
        self.normalises_keys = config.qk_norm and config.mla_k_norm == "exact"
        self.q_norm = RMSNorm(self.qk_head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        if self.normalises_keys:
            self.k_norm = KeyNorm(self.qk_head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_states_BTD: Tensor,
        attention_mask: Visible | None,
        rotary: Rotary,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        mask, padding, documents, filled = attention_mask or Visible()
        x = pack(hidden_states_BTD, documents)
        B, T, _ = x.shape
        q = self.q_b_proj(self.q_a_proj(x)).view(B, T, -1, self.qk_head_dim)
        q = self.q_norm(q).transpose(1, 2)
        latent, key_rope = self.kv_a_proj_with_mqa(x).split([self.rank, self.rope], dim=-1)
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        up_weight, up_bias = self.kv_b_proj()
        key_scale = None
        if self.normalises_keys:
            key_scale = self.inverse_key_rms(latent, key_rope, up_weight, up_bias)
            weight, _ = self.k_norm()
            key_rope = key_rope * weight[self.nope :]
            q_nope = q_nope * weight[: self.nope]
        q = scaled(torch.cat((q_nope, turned(q_rope, rotary, self.rotary_key)), dim=-1), rotary)
        key_rope = turned(key_rope[:, None], rotary, self.rotary_key)

        latent = latent[:, None]
        if past_key_values is not None:
            values = key_rope if key_scale is None else torch.cat((key_rope, key_scale.transpose(1, 2)[:, None]), -1)
            latent, values = (t[:, :, :filled] for t in past_key_values.update(latent, values, self.layer_idx))
            key_rope = values[..., : self.rope]
            if key_scale is not None:
                key_scale = values[:, 0, :, self.rope :].transpose(1, 2)
        tensors = q, latent[:, 0], key_rope[:, 0], up_weight, up_bias
        scale = self.qk_head_dim**-0.5
        if past_key_values is not None and T == 1:
            o = absorbed_latent_attention(*tensors, self.num_kv_heads, scale, mask, key_scale, padding)
        else:
            lengths = None if documents is None else documents.lengths
            o = expanded_latent_attention(*tensors, self.num_kv_heads, scale, mask, key_scale, lengths, padding)
        o = o.transpose(1, 2).flatten(2)
        if self.gated:
            o = o * self.g_proj(x).sigmoid()
        return unpack(self.o_proj(o), documents)

    def inverse_key_rms(
        self, latent_BTR: Tensor, key_rope_BTP: Tensor, up_weight: Tensor, up_bias: Tensor | None
    ) -> Tensor:
        """1/rms of every assembled key [W_k c | rope key] before weight and rotation, (B,K,T)."""
        up = F.linear(latent_BTR, up_weight, up_bias).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
        key_rope = key_rope_BTP[:, None].expand(-1, self.num_kv_heads, -1, -1)
        keys = torch.cat((up[..., : self.nope], key_rope), dim=-1)
        return inverse_rms(keys, self.k_norm.eps).squeeze(-1).to(latent_BTR.dtype)
