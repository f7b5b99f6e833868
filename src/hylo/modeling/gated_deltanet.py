"""The Gated DeltaNet mixer (Yang et al., arXiv 2412.06464), with flash-linear-attention's parameters and semantics."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from hylo.modeling.attention import RMSNorm, ShortConv
from hylo.modeling.cache import read_states, write_states
from hylo.modeling.configuration import HyloConfig
from hylo.modeling.documents import Documents, pack, unpack
from hylo.modeling.rope import Rotary, rotary_key, turned
from hylo.ops.gated_delta import gated_delta_rule
from hylo.ops.short_conv import short_conv


class GatedDeltaNet(nn.Module):
    """out = o_proj(RMSNorm(o) * silu(g_proj x)), o from the gated delta rule over convolved, normalised q, k, v."""

    def __init__(self, config: HyloConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.num_heads = layer_idx, config.gdn_num_heads
        self.rotary_key = rotary_key(config, "gated_deltanet", layer_idx)
        self.key_dim = self.num_heads * config.gdn_head_dim
        self.value_dim = self.key_dim * config.gdn_expand_v
        hidden, width = config.hidden_size, config.conv_kernel_size
        self.q_proj = nn.Linear(hidden, self.key_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, self.key_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, self.value_dim, bias=config.qkv_bias)
        self.a_proj = nn.Linear(hidden, self.num_heads, bias=False)
        self.b_proj = nn.Linear(hidden, self.num_heads, bias=False)
        self.g_proj = nn.Linear(hidden, self.value_dim, bias=False)
        self.o_proj = nn.Linear(self.value_dim, hidden, bias=False)
        self.q_conv1d = ShortConv(self.key_dim, self.key_dim, width, groups=self.key_dim, bias=False)
        self.k_conv1d = ShortConv(self.key_dim, self.key_dim, width, groups=self.key_dim, bias=False)
        self.v_conv1d = ShortConv(self.value_dim, self.value_dim, width, groups=self.value_dim, bias=False)
        self.A_log = nn.Parameter(torch.zeros(self.num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.num_heads))
        self.o_norm = RMSNorm(self.value_dim // self.num_heads, config.rms_norm_eps)

    def forward(
        self,
        hidden_states_BTD: Tensor,
        documents: Documents | None = None,
        rotary: Rotary | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """documents: where rows are padded or packed; padding gives zeros. `rotary`: read under positions hype."""
        x, core = pack(hidden_states_BTD, documents), torch.promote_types(hidden_states_BTD.dtype, torch.float32)
        cu_seqlens = None if documents is None else documents.cu_seqlens
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)
        beta = self.b_proj(x).to(core).sigmoid()
        g = -self.A_log.to(core).exp() * F.softplus(self.a_proj(x).to(core) + self.dt_bias)

        conv_state, state = read_states(past_key_values, self.layer_idx)
        weight = torch.cat([conv()[0] for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)])
        qkv, conv_state = short_conv(qkv, weight, state_NCS=conv_state, cu_seqlens=cu_seqlens)
        qkv = F.silu(qkv).split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in qkv)
        q, k = (turned(t, rotary, self.rotary_key, heads=2) for t in (q, k))
        caching = past_key_values is not None
        o, state = gated_delta_rule(
            q,
            k,
            v,
            g,
            beta,
            initial_state=state,
            output_final_state=caching,
            use_qk_l2norm=True,
            cu_seqlens=cu_seqlens,
        )
        write_states(past_key_values, self.layer_idx, conv_state, state)
        return unpack(self.o_proj(self.o_norm(o).flatten(2) * F.silu(self.g_proj(x))), documents)
